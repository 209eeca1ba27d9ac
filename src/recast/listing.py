"""What each target runs a form with, found by lowering a small model that holds all forms; kept until something of it changes."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recast.kernels.kept import cache_directory
from recast.lowering.artifact import lower
from recast.lowering.base import lowering_named, lowerings
from recast.lowering.timing import read_times, times_file, write_times
from recast.passes.cache import OperatorCache, sources
from recast.passes.forms import Form, forms
from recast.passes.forms.registry import module_forms
from recast.passes.plan import plan
from recast.passes.progress import track
from recast.passes.recipe import Recipe, Rule
from recast.passes.rewrite import rewrite
from recast.patterns.capture.export import capture
from recast.patterns.errors import FormError, RecastError, TargetError
from recast.patterns.program import Program

__all__ = ["forms_by_target"]

_LARGE = (4096, 4096)
_COMBINED = ("low_rank(ratio=0.5) | int8", "int4(group=32) + low_rank(rank=16)")


class _Branches(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.form = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.form]


def forms_by_target(*asked: str) -> list[dict[str, Any]]:
    """Every form with its parameters and what each target runs it with, found by lowering a small model.

    Lowering all takes a minute; what was found is kept on disk until recast, what it runs on or a form changes.

    Parameters
    ----------
    asked
        Names of forms or expressions of them: these alone. None: all forms and two expressions.

    Returns
    -------
    list of dict
        ``name`` (empty for an expression), ``summary``, ``parameters``, ``example`` and ``targets``, the kernel by target. Of those
        that were asked for also ``about``, what the form is in algebra, what it holds and where it comes from, and ``size``,
        what a weight of 4096 x 4096 in bfloat16 becomes; None where it depends on the weight, or there is none to tell.

    Raises
    ------
    FormError
        A name is of no form, or an expression of it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    unfit: list[dict[str, Any]] = []  # forms that a weight alone is not enough for
    known = forms() | module_forms()
    for name, kind in known.items():
        if asked and name not in asked:
            continue
        parameters = [{"name": p.name, "type": p.type, "default": p.default, "help": p.help} for p in kind.parameters()]
        example = next((str(form) for form in kind.examples((64, 64))), None)
        rows.append({"name": name, "summary": kind.summary, "parameters": parameters, "example": example or name})
        if example is None:
            block = kind.site_kind != "linear"
            why = "smaller dense matrices" if block else "not tried: needs calibration with a loss"
            unfit.append(rows.pop() | {"targets": dict.fromkeys(lowerings(), why)})
    combined = [text for text in asked if text not in known] if asked else [t for t in _COMBINED if _reads(t)]
    for text in combined:
        Form.parse(text).check((64, 64))
        rows.append({"name": "", "summary": "an expression", "parameters": [], "example": text})
    if asked:
        for row in [*rows, *unfit]:
            named = known.get(row["name"])
            row["about"] = None if named is None else _about(named)
            # Of a form by name, what its first example for such a weight is; of an expression, that.
            large = None if named is None else next(iter(named.examples(_LARGE)), None)
            row["size"] = _size(Form.parse(row["example"]) if named is None else large)
    for row, kernels in zip(rows, _kernels_of([row["example"] for row in rows]), strict=True):
        row["targets"] = dict(zip(lowerings(), kernels, strict=True))
    return sorted(rows + unfit, key=lambda row: (not row["name"], row["name"]))


def _about(kind: type) -> str:
    """What a class says of itself, up to its examples."""
    told = inspect.cleandoc(kind.__doc__ or "").partition("\nExamples\n")[0]
    return re.sub(r"\n*Notes\n-+\n", "\n\n", told).replace("``", "").strip()


def _size(form: Any) -> dict[str, Any] | None:
    """Bytes and operations of a form of a large weight, as its outline counts them."""
    if not isinstance(form, Form):
        return None
    try:
        form.check(_LARGE)
        made = form.outline(_LARGE, torch.bfloat16)
    except FormError:
        return None
    if made is None:
        return None
    m, n = _LARGE
    return {
        "form": str(form),
        "shape": list(_LARGE),
        "bytes": made.nbytes,
        "share of bytes": made.nbytes / (2 * m * n),
        "share of operations": made.cost(1).flops / (2 * m * n),
    }


def _kernels_of(texts: list[str]) -> list[list[str]]:
    """What the targets run each form with, as far as it is not known yet."""
    if not texts:
        return []
    file = _kernels_file(texts)
    kept = None if file is None else read_times(file)
    if kept is not None:
        kernels: list[list[str]] = kept["kernels"]
        return kernels
    cache = OperatorCache(None)
    rewritten = _branches(texts, cache)
    targets = track(list(lowerings()), "lowering every form", None)
    found = [list(row) for row in zip(*(_kernels(texts, rewritten, target, cache) for target in targets), strict=True)]
    if file is not None:
        write_times(file, {"kernels": found})
    return found


def _kernels_file(texts: list[str]) -> Path | None:
    """Where it is kept what runs these forms: other code of recast, of a form or of a runtime is another file."""
    if cache_directory() is None:
        return None
    digest = hashlib.sha256()
    for folder, _, names in os.walk(Path(__file__).parent, followlinks=True):
        for name in sorted(names):
            if name.endswith((".py", ".c")):
                digest.update((Path(folder) / name).read_bytes())
    own = [sources(Form.parse(text)) for text in texts]
    return times_file(torch.device("cpu"), "kernels of forms", texts, own, digest.hexdigest(), _versions())


def _versions() -> list[str]:
    found = []
    for name in ("onnxruntime", "onnxscript", "triton"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _branches(texts: list[str], cache: OperatorCache) -> Program:
    """A program with a matrix in each of several forms."""
    program = capture(_Branches(len(texts)).eval(), (torch.randn(4, 64),))
    rules = tuple(Rule(f"form.{i}", Form.parse(text)) for i, text in enumerate(texts))
    decided = plan(program, Recipe(rules=rules, allow_larger=True), cache=cache, progress=False)
    return rewrite(program, decided, cache=cache, verification=False, progress=False, pictures=False)


def _kernels(texts: list[str], rewritten: Program, target: str, cache: OperatorCache) -> list[str]:
    """What a target runs each form of such a program with, or why not; of one that is not here, what it would."""
    kind = lowering_named(target)
    try:
        kind.installed()
    except TargetError as error:
        known = kind().kernels(rewritten)
        otherwise = "dense" if known else f"not here: {str(error).partition(';')[0]}"
        return [known.get(f"form.{i}", otherwise) for i in range(len(texts))]
    try:
        report = lower(rewritten, target).report
    except RecastError as error:
        # A form that the target does not take is looked for by halves, and the others are told as they are.
        half = len(texts) // 2
        if half and not isinstance(error.__cause__, ImportError):
            parts = (texts[:half], texts[half:])
            return [kernel for part in parts for kernel in _kernels(part, _branches(part, cache), target, cache)]
        return [f"not here: {str(error).partition(';')[0]}"] * len(texts)
    kernels = {row.name: row.kernel for row in report.rows}
    return [kernels.get(f"form.{i}", "dense") for i in range(len(texts))]


def _reads(text: str) -> bool:
    try:
        Form.parse(text)
    except FormError:
        return False
    return True
