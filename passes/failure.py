"""What is kept of a pass that broke a program: both graphs, and all it takes to run the passes again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recast.passes.base import Context, Pass, Pipeline
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.plan import Plan
from recast.passes.serialize import program_from, program_to
from recast.passes.verify import check
from recast.patterns.errors import ArtifactError, RecastError, VerificationError
from recast.patterns.program import Program

__all__ = ["Failure", "keep_failure", "read_failure", "replay", "verify"]

_FORMAT = "recast-failure-1"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A kept failure, ready to run again.

    Parameters
    ----------
    program
        As it was before the first pass.
    context
        Plan, statistics and operators that the passes read.
    pipeline
        The passes up to the one that failed, and that one.
    message
        What verification said.
    torch
        Version that it was said under.
    """

    program: Program
    context: Context
    pipeline: Pipeline
    message: str
    torch: str


def verify(
    origin: Program, before: Program, after: Program, step: Pass, done: list[str], context: Context
) -> dict[str, Any]:
    """Check what a pass must leave intact.

    Parameters
    ----------
    origin
        The program before the first pass: what is kept to run them again.
    before, after
        Around this pass.
    step, done
        The pass, and those before it.
    context
        What they read.

    Returns
    -------
    dict
        What was checked, with the figures.

    Raises
    ------
    VerificationError
        Naming the pass, the place, and the passes before it; graphs and program are written to a folder.
    """
    try:
        return check(before, after, step, context)
    except VerificationError as error:
        folder, replayable = keep_failure(origin, before, after, [*done, str(step)], context, str(error))
        raise VerificationError(
            f"verification: pass '{step}' broke the program: {error}; passes before it: {', '.join(done) or 'none'}; "
            f"graphs before and after are in {folder} (diff before.txt after.txt); {replayable}"
        ) from error


def keep_failure(
    origin: Program, before: Program, after: Program, passes: list[str], context: Context, message: str
) -> tuple[Path, str]:
    """Write a failure to a new folder; give it, and the command that runs it again or the reason why there is none."""
    folder = Path(tempfile.mkdtemp(prefix="recast-verification-"))
    (folder / "before.txt").write_text(str(before), encoding="utf-8")
    (folder / "after.txt").write_text(str(after), encoding="utf-8")
    (folder / "plan.yaml").write_text(str(context.plan), encoding="utf-8")
    (folder / "pipeline.txt").write_text(",".join(passes) + "\n", encoding="utf-8")
    try:
        _keep_program(origin, context, message, folder)
    except (RecastError, OSError, SafetensorError, RuntimeError) as error:
        for name in ("program.json", "program.safetensors", "statistics.safetensors"):
            (folder / name).unlink(missing_ok=True)
        return folder, f"the program is not there, so it cannot be replayed: {error}"
    return folder, f"to run it again: recast replay {folder}"


def _keep_program(origin: Program, context: Context, message: str, folder: Path) -> None:
    if any(t.untyped_storage().nbytes() == 0 and t.numel() for t in origin.storages()):
        raise VerificationError("its dense weights were released")
    room, needed = shutil.disk_usage(folder).free, origin.nbytes()
    if needed > room // 2:
        raise VerificationError(f"its {needed:,} bytes of weights would fill the disk ({room:,} bytes free)")
    described, tensors = program_to(origin)
    save_file(tensors, folder / "program.safetensors")
    if context.calibration is not None:
        context.calibration.save(folder / "statistics.safetensors")
    data = {"format": _FORMAT, "message": message, "torch": torch.__version__, "program": described}
    (folder / "program.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def read_failure(directory: str | os.PathLike[str]) -> Failure:
    """Read what `verify` kept of a failure.

    Raises
    ------
    ArtifactError
        The folder holds none, or a file in it is missing or damaged.
    """
    folder = Path(directory)
    described = folder / "program.json"
    if not described.is_file():
        raise ArtifactError(
            f"replay: '{directory}' holds no program.json; give the folder that a failed verification named"
        )
    try:
        data = json.loads(described.read_text(encoding="utf-8"))
        if data.get("format") != _FORMAT:
            raise ArtifactError(f"replay: '{described}' has format {data.get('format')!r}, this recast reads {_FORMAT}")
        program = program_from(data["program"], load_file(folder / "program.safetensors"))
        plan = Plan.load(folder / "plan.yaml")
        pipeline = Pipeline.parse((folder / "pipeline.txt").read_text(encoding="utf-8").strip())
        kept = folder / "statistics.safetensors"
        statistics = Calibration.load(kept) if kept.is_file() else None
        message, version = str(data["message"]), str(data["torch"])
    except (KeyError, ValueError, TypeError, OSError, SafetensorError, AttributeError) as error:
        if isinstance(error, RecastError):
            raise
        raise ArtifactError(
            f"replay: '{directory}' cannot be read ({type(error).__name__}: {error}); the files of a failure belong together"
        ) from error
    context = Context(plan, statistics, OperatorCache.default(), pictures=False)
    return Failure(program, context, pipeline, message, version)


def replay(failure: Failure, say: Callable[[str], None] = lambda _: None) -> Program:
    """Run the passes of a kept failure again, each verified.

    Parameters
    ----------
    failure
        As `read_failure` gave it.
    say
        Told about each pass.

    Returns
    -------
    Program
        What comes out, if nothing fails any more.

    Raises
    ------
    VerificationError
        A pass breaks the program, as it did.
    """
    current = failure.program
    done: list[str] = []
    for step in failure.pipeline.passes:
        following = step.run(current, failure.context)
        try:
            figures = check(current, following, step, failure.context)
        except VerificationError as error:
            raise VerificationError(
                f"replay: pass '{step}' breaks the program: {error}; passes before it: {', '.join(done) or 'none'}"
            ) from error
        done.append(str(step))
        say(f"{step}: verified, error of the outputs {figures['output_error']:.3g}")
        current = following
    return current
