"""`recast demo`: a real sentence encoder under several recipes, side by side on every target."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.beside import Beside
from recast.comparison import Agreement, interleaved
from recast.encoder import Encoder, model_directory, sentences, spread
from recast.lowering.artifact import Artifact, load, lower, writing_folder
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
from recast.patterns.errors import ArtifactError, RecastError, TargetError
from recast.patterns.program import Program

__all__ = ["RECIPES", "run_demo"]

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


@dataclasses.dataclass
class _Contestant:
    name: str
    target: str
    place: Path
    row: dict[str, Any]
    artifact: Artifact | None = None  # None until another process has made it

    def run(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        assert self.artifact is not None
        return [self.artifact(**batch)]


def run_demo(
    out: Path,
    *,
    targets: Sequence[str] = ("inductor", "onnx"),
    batch: int = 32,
    rounds: int = 5,
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
    say(
        f"loading {folder.parent.name}; {len(recipes)} recipes on {len(targets)} targets, about five minutes on two cores"
    )
    with writing_folder(out, force=True) as temporary, Beside() as beside:
        if any(lowering_named(t).compiles or not lowering_named(t).stores_program for t in targets):
            beside.start()
        model = load_model(str(folder))
        calibration_text, evaluation_text = sentences()
        calibration = _tokens(spread(calibration_text, CALIBRATION), model, 32)
        evaluation = _tokens(spread(evaluation_text, max(EVALUATION, batch)), model, batch)
        assert model.module is not None  # a Hugging Face directory has one
        encoder = Encoder(model.module).eval()
        program = capture(encoder, (), dict(evaluation[0]))
        program.label = "MiniLM-L6"
        with torch.no_grad():
            reference = [encoder(**inputs) for inputs in evaluation]
        statistics = calibrate(program, calibration)

        def judge(contestant: _Contestant) -> None:
            _judge(contestant, evaluation, reference)

        contestants, reports = _prepare(
            program, statistics, recipes, targets, temporary, beside, judge, evaluation[0], say
        )
        for contestant in [c for c in contestants if c.artifact is None and "error" not in c.row]:
            if _fetched(contestant, beside):
                judge(contestant)
        rows = [c.row for c in contestants]
        contestants = [c for c in contestants if c.artifact is not None and "error" not in c.row]
        for name, report in reports.items():
            made = {c.target: c.artifact.report for c in contestants if c.name == name and c.artifact is not None}
            reports[name] = _merged(report, made) if made else report
        say("timing")
        by_key = {f"{c.name}/{c.target}": c for c in contestants}
        # Judging has run each of them several times.
        times = interleaved({key: c.run for key, c in by_key.items()}, evaluation[0], rounds=rounds, warm=True)
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

    batches = tokenized(texts, model, size, TOKENS, pad=True, inputs=("input_ids", "attention_mask"))
    return [b for b in batches if len(b["input_ids"]) == size]


def _prepare(
    program: Program,
    statistics: Calibration,
    recipes: Mapping[str, Any],
    targets: Sequence[str],
    folder: Path,
    beside: Beside,
    judge: Callable[[_Contestant], None],
    inputs: Mapping[str, Tensor],
    say: Callable[[str], None],
) -> tuple[list[_Contestant], dict[str, Report]]:
    """Rewrite by every recipe, lower to every target, and judge what is lowered here.

    Rewriting uses all cores, so it comes first. Lowering uses one: targets whose files are all that is needed are made in
    another process, which then compiles for the others from the last recipe on, while this one does from the first on.
    """
    cache = OperatorCache.default()
    contestants: list[_Contestant] = []
    reports: dict[str, Report] = {}
    absent: set[str] = set()
    programs: dict[str, Program] = {}
    for name, recipe in recipes.items():
        say(f"rewriting: {name}")
        programs[name] = program.copy()
        if recipe:
            programs[name] = rewrite(program, plan(program, Recipe.of(recipe), statistics, cache=cache), cache=cache)
            reports[name] = programs[name].report
    handed: dict[str, Path] = {}

    def program_of(name: str) -> Path:
        if name not in handed:
            handed[name] = beside.hand(programs[name])
        return handed[name]

    jobs: list[tuple[_Contestant, Program]] = []
    for name, rewritten in programs.items():
        for target in (t for t in targets if t not in absent):
            row: dict[str, Any] = {"name": name, "target": target, "bytes": None, "milliseconds": None, "fidelity": {}}
            contestant = _Contestant(name, target, folder / "artifacts" / _slug(name) / target, row)
            contestants.append(contestant)
            kind = lowering_named(target)
            try:
                kind.installed()
            except TargetError as error:
                row["error"] = str(error).splitlines()[0]
                absent.add(target)
                continue
            if kind.stores_program:
                jobs.append((contestant, rewritten))
            else:
                beside.lower(program_of(name), target, contestant.place)
    for contestant, _ in reversed(jobs):
        if lowering_named(contestant.target).compiles:
            beside.compile(program_of(contestant.name), contestant.target, contestant.place, inputs)
    for contestant, rewritten in jobs:
        if lowering_named(contestant.target).compiles and not beside.claim(contestant.place):
            continue
        say(f"compiling: {contestant.name}")
        try:
            contestant.artifact = lower(rewritten, contestant.target)
            contestant.artifact.save(contestant.place)
        except TargetError as error:
            contestant.row["error"] = str(error).splitlines()[0]
            continue
        _describe(contestant)
        judge(contestant)
    order = {target: i for i, target in enumerate(targets)}
    return sorted(contestants, key=lambda c: order[c.target]), reports


def _fetched(contestant: _Contestant, beside: Beside) -> bool:
    """Load what another process has made; False, with the reason in the row, where it could not."""
    try:
        beside.wait(contestant.place)
        contestant.artifact = load(contestant.place)
    except TargetError as error:
        contestant.row["error"] = str(error).splitlines()[0]
        return False
    _describe(contestant)
    return True


def _describe(contestant: _Contestant) -> None:
    assert contestant.artifact is not None
    report = contestant.artifact.report
    coverage = _coverage(report) if report.rows else None
    contestant.row.update(bytes=stored_bytes(contestant.place), coverage=coverage)


def _judge(contestant: _Contestant, batches: Sequence[Mapping[str, Tensor]], reference: Sequence[Tensor]) -> None:
    """Note fidelity in the row, or the reason where it does not run here."""
    agreement = Agreement()
    try:
        for inputs, expected in zip(batches, reference, strict=True):
            agreement.add(expected, contestant.run(inputs)[0])
    except Exception as error:  # noqa: BLE001  # a compiler that is missing or fails raises what it likes; the others go on
        lines = [line for line in str(error).splitlines() if line.strip()]
        contestant.row["error"] = f"does not run here: {lines[0] if lines else type(error).__name__}"
        if isinstance(error, RecastError):
            contestant.row["error"] = lines[0]
        return
    contestant.row["fidelity"] = agreement.to_dict()


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
