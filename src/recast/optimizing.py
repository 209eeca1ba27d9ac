"""`recast optimize`: everything checked first, then the work, then one folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recast.data import is_statistics, read_batches
from recast.lowering.agreement import agree
from recast.lowering.artifact import check_writable, lower
from recast.lowering.base import lowering_named
from recast.lowering.pays import refuse_slower
from recast.models import Model, load_model
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration, calibrate
from recast.passes.forms.shared import needs_drift
from recast.passes.plan import Plan, check_coverage, plan
from recast.passes.recipe import Recipe
from recast.passes.report import Report
from recast.passes.rewrite import rewrite
from recast.patterns.constants import Constants
from recast.patterns.errors import ArtifactError, CalibrationError, ModelError, RecipeError, TargetError
from recast.patterns.find import coverage
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program

__all__ = ["Request", "optimize_model"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for on the command line; see ``recast optimize --help``."""

    model: str
    out: Path
    recipe: str | None = None
    calibrate: Path | None = None
    target: str | None = None  # by default onnx for an .onnx file, else inductor
    budget: str | None = None
    min_coverage: float | None = None
    plan: Path | None = None
    save_plan: Path | None = None
    save_statistics: Path | None = None
    batch_size: int = 8
    limit: int | None = 256
    force: bool = False
    jobs: int | None = None
    sequential: bool = False
    tokens: str | None = None
    allow_slower: bool = False
    cache: bool = False
    genai: bool = False
    accuracy_level: int | None = None
    embeddings: str | None = None
    style: str | None = None
    cache_type: str | None = None

    def lowering_options(self) -> dict[str, Any]:
        """Options of the target that were given."""
        if self.genai and not self.cache:
            raise TargetError("optimize: --genai is for decoders with their cache; it goes with --cache")
        if self.cache_type and not self.cache:
            raise TargetError("optimize: --cache-type is for decoders with their cache; it goes with --cache")
        found: dict[str, Any] = {
            "accuracy_level": self.accuracy_level,
            "embeddings": self.embeddings,
            "style": self.style,
            "cache": self.cache_type,
        }
        found = {name: value for name, value in found.items() if value is not None}
        found = {**found, "genai": True} if self.genai else found
        target = self.target or ("onnx" if self.model.endswith(".onnx") else "inductor")
        if target != "onnx" and found:
            raise TargetError(
                "optimize: --genai, --accuracy-level, --embeddings, --style and --cache-type are of the target onnx; add -t onnx"
            )
        return found

    def counts(self) -> list[int] | None:
        """Numbers of tokens to time forms with, None for no timing."""
        if self.tokens is None:
            return None
        parts = self.tokens.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise RecipeError(f"optimize: --tokens '{self.tokens}' names no numbers of vectors; 1,128 would do")
        return None if self.allow_slower else [int(part) for part in parts]

    def asked(self) -> Recipe:
        """The recipe with what the options add."""
        recipe = Recipe.of(self.recipe or "int8")
        changes: dict[str, float | None] = {}
        if self.budget is not None:
            changes["budget"] = Recipe.of({"budget": self.budget}).budget
        if self.min_coverage is not None:
            changes["min_coverage"] = self.min_coverage
        asked = dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]  # names and types match
        asked.check()
        return asked


def optimize_model(request: Request, say: Callable[[str], None]) -> Report:
    """Do what was asked; gives the report that was written.

    Raises
    ------
    RecastError
        Of the kind that says what is wrong; nothing is left half written.
    """
    # What can be refused without loading anything is refused first.
    check_writable(request.out.absolute(), force=request.force)
    _check_replaceable(request.out)
    for beside in (request.save_plan, request.save_statistics):
        if beside is not None and (beside.is_dir() or not os.access(beside.absolute().parent, os.W_OK)):
            raise ArtifactError(
                f"optimize: '{beside}' cannot be written: a file in a folder you may write to is needed"
            )
    target = request.target or ("onnx" if request.model.endswith(".onnx") else "inductor")
    kind, options = lowering_named(target), request.lowering_options()
    kind(**options)  # a value that the target does not take is refused before the work
    if request.plan is not None and (request.recipe is not None or request.budget is not None):
        raise RecipeError("optimize: --plan says what to do already; leave --recipe and --budget out, or --plan")
    recipe, counts = request.asked(), request.counts()
    if request.sequential and (request.calibrate is None or request.plan is not None):
        raise CalibrationError(
            "optimize: --sequential fits while it calibrates: it needs --calibrate with real inputs, and takes no --plan"
        )
    ready = Plan.load(request.plan) if request.plan is not None else None
    if request.calibrate is not None and not request.calibrate.is_file():
        raise CalibrationError(
            f"data: there is no file '{request.calibrate}'; give a .txt, .jsonl or .safetensors file"
        )
    say(f"loading {request.model}")
    model = load_model(request.model)
    model.cache = request.cache
    program = model.program()
    asks = ready is not None or recipe.rules or recipe.candidates or str(recipe.default) not in ("dense", "None")
    if model.artifact is not None and asks and not find_linear(program, Constants(program))[0]:
        raise ModelError(
            f"optimize: '{request.model}' is an artifact without a matrix that is left to rewrite; the model that it was made from, "
            "as a Hugging Face directory or package.module:function, would work, with another recipe or target"
        )
    cache = OperatorCache.default()
    statistics = _statistics(request, model, program, recipe, ready, cache, say)
    if statistics is not None and request.save_statistics is not None:
        statistics.save(request.save_statistics)
    if ready is None:
        ready = plan(program, recipe, statistics, cache=cache, jobs=request.jobs)
    else:
        covered = coverage(program)
        check_coverage(covered.fraction, recipe.min_coverage, covered)
    if request.save_plan is not None:
        ready.save(request.save_plan)
    say("rewriting and verifying")
    rewritten = rewrite(program, ready, calibration=statistics, cache=cache, jobs=request.jobs)
    if counts is not None:
        say(f"timing forms on {target}, beside dense")
        paying = refuse_slower(rewritten, ready, target, counts)
        if paying is not ready:
            rewritten = rewrite(program, paying, calibration=statistics, cache=cache, jobs=request.jobs)
    say(f"lowering to {target}")
    artifact = lower(rewritten, target, **options)
    say(f"running it on {target}, beside the eager program")
    artifact.report = agree(artifact, statistics)
    artifact.beside = model.tokenizer_files() if request.cache else []
    artifact.save(request.out, force=request.force)
    return artifact.report


def _check_replaceable(out: Path) -> None:
    """Refuse to replace, even by force, a folder that holds something else than an artifact."""
    if out.is_dir() and any(out.iterdir()) and not (out / "recast.json").is_file():
        raise ArtifactError(
            f"artifact: '{out}' holds files that are not an artifact's, which --force would delete; choose another "
            "folder, or empty this one yourself"
        )


def _statistics(
    request: Request,
    model: Model,
    program: Program,
    recipe: Recipe,
    ready: Plan | None,
    cache: OperatorCache,
    say: Callable[[str], None],
) -> Calibration | None:
    if request.calibrate is None:
        return None
    if is_statistics(request.calibrate):
        found = Calibration.load(request.calibrate)
        found.check(program, recipe if request.plan is None else None)
        if request.sequential and not found.behind:
            raise CalibrationError(
                f"optimize: '{request.calibrate}' holds statistics of the model as it is; --sequential needs real inputs, or "
                "statistics that a run with it saved"
            )
        return found
    read = read_batches(request.calibrate, model, batch_size=request.batch_size, limit=request.limit, say=say)
    batches = [model.complete(batch) for batch in read]
    forms = [e.form for e in ready.entries.values()] if ready else [recipe.default, *(r.form for r in recipe.rules)]
    asked = recipe if request.sequential else None
    return calibrate(program, batches, recipe=asked, cache=cache, drift=needs_drift(forms))
