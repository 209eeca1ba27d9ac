"""`Artifact`: something that runs and can be saved; `lower`, `load` and `optimize`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from recast.lowering.agreement import agree
from recast.lowering.base import Lowering, Runner, lowering_named
from recast.lowering.pays import refuse_slower
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import calibrate
from recast.passes.plan import Plan, plan
from recast.passes.recipe import Recipe
from recast.passes.render import page
from recast.passes.report import Report
from recast.passes.rewrite import rewrite
from recast.passes.serialize import program_from, program_to
from recast.passes.spec import decode_spec, encode_spec
from recast.patterns.capture.export import capture
from recast.patterns.errors import ArtifactError, CalibrationError, RecastError, TargetError
from recast.patterns.program import Interface, Program

__all__ = ["Artifact", "load", "lower", "optimize", "writing_folder"]

_FORMAT = "recast-artifact-1"


class Artifact:
    """A program lowered to a target. Called like the model.

    Attributes
    ----------
    target
        Name of the target.
    report
        What the rewrite did, with the kernel each site got.
    plan
        What was decided.
    beside
        Files that `save` puts into the folder too: a tokenizer's.
    """

    def __init__(
        self,
        lowering: Lowering,
        runner: Runner,
        interface: Interface,
        report: Report,
        plan_: Plan | None,
        program: Program | None,
    ) -> None:
        self.lowering, self.runner, self.interface = lowering, runner, interface
        self.report, self.plan = report, plan_
        self.beside: list[Path] = []
        self._program = program
        self._positions = list(interface.mutations)

    @property
    def target(self) -> str:
        """Name of the target."""
        return self.lowering.name

    @property
    def program(self) -> Program:
        """The rewritten program.

        Raises
        ------
        ArtifactError
            The artifact was loaded from files that do not hold one (ONNX).
        """
        if self._program is None:
            raise ArtifactError(
                f"artifact: loaded for target '{self.target}', it holds no torch program; save the 'eager' target to keep one"
            )
        return self._program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the model's own arguments."""
        leaves = self._program.flatten(*args, **kwargs) if self._program else self.interface.flatten(args, kwargs)
        results = self.runner(leaves)
        if self._program is not None:
            results = self._program.finish(results, leaves)
        return pytree.tree_unflatten(results, self.interface.out_spec)

    def save(self, directory: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write everything needed to run without the original weights; whole or not at all.

        Parameters
        ----------
        directory
            Made anew; an existing one is an error unless `force` replaces it, which only an artifact or an empty folder is.

        Raises
        ------
        ArtifactError
            The directory exists, is something other than an artifact, cannot be written, or the disk is full.
        """
        there = Path(directory)
        if there.is_dir() and any(there.iterdir()) and not (there / "recast.json").is_file():
            raise ArtifactError(
                f"artifact: '{directory}' exists and holds something other than an artifact, which is never replaced; "
                "choose another folder"
            )
        with writing_folder(directory, force=force) as folder:
            data: dict[str, Any] = {
                "format": _FORMAT,
                "target": self.target,
                "torch": torch.__version__,
                "lowering": self.lowering.extra(),
                "fingerprint": self.plan.fingerprint if self.plan else "",
            }
            if self.lowering.stores_program:
                data["program"], tensors = program_to(self.program)
                save_file(tensors, folder / "weights.safetensors")
                _readable(folder / "weights.safetensors")
            else:
                data["interface"] = _interface_to(self.interface)
            self.lowering.write(folder)
            for path in self.beside:
                shutil.copyfile(path, folder / path.name)
            (folder / "report.json").write_text(json.dumps(self.report.to_dict(), indent=1), encoding="utf-8")
            (folder / "report.html").write_text(page(self.report), encoding="utf-8")
            if self.plan is not None:
                (folder / "plan.yaml").write_text(str(self.plan), encoding="utf-8")
            data["files"] = {p.name: _checksum(p) for p in sorted(folder.iterdir())}
            text = json.dumps(data, indent=1)
            (folder / "recast.json").write_text(text, encoding="utf-8")
            (folder / "recast.json.sha256").write_text(
                hashlib.sha256(text.encode()).hexdigest() + "\n", encoding="utf-8"
            )

    def __repr__(self) -> str:
        return f"<Artifact {self.report.model} for {self.target}: {self.report.bytes_after:,} bytes>"


def _interface_to(interface: Interface) -> dict[str, Any]:
    return {
        "parameters": list(interface.parameters),
        "args": list(interface.args),
        "kwargs": list(interface.kwargs),
        "in_spec": encode_spec(interface.in_spec),
        "out_spec": encode_spec(interface.out_spec),
        "constants": {str(k): v for k, v in interface.constants.items()},
    }


def _interface_from(data: dict[str, Any]) -> Interface:
    return Interface(
        parameters=tuple(data["parameters"]),
        args=tuple(data["args"]),
        kwargs=tuple(data["kwargs"]),
        in_spec=decode_spec(data["in_spec"]),
        out_spec=decode_spec(data["out_spec"]),
        constants={int(k): v for k, v in data["constants"].items()},
    )


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def writing_folder(directory: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `directory` that takes its place when all went well, and is gone if not."""
    target = Path(directory).absolute()
    check_writable(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(
            f"artifact: '{directory}' cannot be written: {error.strerror}; choose a folder you may write to"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / target.name)
            try:
                folder.replace(target)
            except BaseException:
                (old / target.name).replace(target)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            folder.replace(target)
    except OSError as error:
        raise ArtifactError(
            f"artifact: '{directory}' cannot be written: {error.strerror or error}; nothing was left behind"
        ) from error
    except SafetensorError as error:
        raise ArtifactError(f"artifact: '{directory}' cannot be written: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _readable(path: Path) -> None:
    """Give a file the permissions that any new file has; safetensors makes its own readable by the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def check_writable(target: Path, *, force: bool = False) -> None:
    """Raise ArtifactError if a folder exists (unless forced) or its parent cannot be written."""
    if target.exists() and not force:
        raise ArtifactError(
            f"artifact: '{target.name}' exists; pass --force (force=True) to replace it, or choose another folder"
        )
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"artifact: '{target.name}' is a file, a folder is needed; choose another name")
    parent = next((p for p in target.parents if p.exists()), None)
    if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(
            f"artifact: '{target}' cannot be written: no permission in '{parent}'; choose a folder you may write to"
        )


def lower(program: Program, target: str = "inductor", **options: Any) -> Artifact:
    """Make a rewritten program run on a target.

    Parameters
    ----------
    program
        As `recast.rewrite` (or `recast.capture`) gave it.
    target
        ``eager``, ``inductor`` or ``onnx``.
    options
        Of the target.

    Raises
    ------
    TargetError
        The target is unknown, not installed, or cannot express something.

    Examples
    --------
    >>> import torch, recast
    >>> program = recast.capture(torch.nn.Linear(8, 4).eval(), (torch.randn(3, 8),))
    >>> recast.lower(program, target="eager")(torch.randn(5, 8)).shape
    torch.Size([5, 4])
    """
    kind = lowering_named(target)
    try:
        lowering = kind(**options)
    except TypeError as error:
        raise TargetError(f"target '{target}': {error}") from error
    runner = lowering.prepare(program)
    report = program.report or Report(program.label, [], [], program.nbytes(), program.nbytes())
    kernels = lowering.kernels(program)
    report = report.on(target, kernels)
    report = dataclasses.replace(report, notes=[*report.notes, *lowering.notes()])
    return Artifact(lowering, runner, program.interface, report, program.plan, program)


def load(directory: str | os.PathLike[str]) -> Artifact:
    """Load a saved artifact; every file is checked against its checksum first.

    Raises
    ------
    ArtifactError
        The folder is missing, a file in it is missing or damaged, or it was written in another format.
    """
    folder = Path(directory)
    described = folder / "recast.json"
    if not described.is_file():
        raise ArtifactError(
            f"artifact: '{directory}' holds no recast.json; give a folder that artifact.save or `recast optimize` wrote"
        )
    text = described.read_text(encoding="utf-8", errors="replace")
    seal = folder / "recast.json.sha256"
    if not seal.is_file():
        raise ArtifactError(f"artifact: '{seal}', the checksum of '{described}', is missing; copy the whole folder")
    if seal.read_text(errors="replace").strip() != hashlib.sha256(text.encode()).hexdigest():
        raise ArtifactError(f"artifact: '{described}' is damaged (checksum differs); copy it again, or make it anew")
    try:
        return _load(folder, json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RecastError):
            raise
        raise ArtifactError(
            f"artifact: '{directory}' cannot be read ({type(error).__name__}: {error}); make it anew"
        ) from error


def _load(folder: Path, data: dict[str, Any]) -> Artifact:
    if data.get("format") != _FORMAT:
        raise ArtifactError(f"artifact: '{folder}' has format {data.get('format')!r}, this recast reads {_FORMAT}")
    for name, expected in data["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"artifact: '{path}' is missing; copy the whole folder")
        if _checksum(path) != expected:
            raise ArtifactError(f"artifact: '{path}' is damaged (checksum differs); copy it again, or make it anew")
    report = Report.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    plan_ = Plan.load(folder / "plan.yaml") if "plan.yaml" in data["files"] else None
    kind = lowering_named(data["target"])
    if not kind.stores_program:
        lowering, runner = kind.read(folder, data)
        return Artifact(lowering, runner, _interface_from(data["interface"]), report, plan_, None)
    program = program_from(data["program"], load_file(folder / "weights.safetensors"))
    program.report, program.plan = report, plan_
    lowering = kind(**data["lowering"])
    return Artifact(lowering, lowering.prepare(program), program.interface, report, plan_, program)


def optimize(
    model: nn.Module | Program | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    recipe: Any = "int8",
    batches: Iterable[Any] | None = None,
    target: str = "inductor",
    dynamic_shapes: Any = None,
    cache: OperatorCache | None = None,
    progress: bool | None = None,
    verification: bool = True,
    sequential: bool = False,
    tokens: Sequence[int] | None = None,
    allow_slower: bool = False,
) -> Artifact:
    """Capture, calibrate, plan, rewrite and lower in one call.

    Parameters
    ----------
    model, args, kwargs, dynamic_shapes
        As for `recast.capture`; a `Program` is taken as it is.
    recipe
        A form's text, a path to a YAML file, a dict, or a `Recipe`.
    batches
        Calibration data; without, fits are data-free and errors are those of the weights.
    target
        ``eager``, ``inductor`` or ``onnx``.
    verification
        Check the program after every pass, and what the target computes against the eager program.
    sequential
        Fit each matrix on what reaches it behind those that were rewritten before it, as ``calibrate(recipe=...)`` does.
    tokens
        Numbers of vectors that a matrix will meet at a time. Every form is timed with them on the target beside the dense matrix
        (once on a machine), and one that is slower at all of them is refused: its site stays dense, the figures are in the report.
    allow_slower
        Time nothing and refuse nothing.

    Examples
    --------
    >>> import torch, recast
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    >>> artifact = recast.optimize(model, (torch.randn(4, 64),), recipe="int8", target="eager")
    >>> artifact(torch.randn(9, 64)).shape, len(artifact.report.rows)
    (torch.Size([9, 8]), 2)
    """
    asked = Recipe.of(recipe)
    asked.check()
    lowering_named(target)  # an unknown target is better refused before the work than after it
    program = model if isinstance(model, Program) else capture(model, args, kwargs, dynamic_shapes)
    cache = cache or OperatorCache.default()
    statistics = None
    if batches is not None:
        behind = asked if sequential else None
        statistics = calibrate(program, batches, recipe=behind, cache=cache, progress=progress)
    elif sequential:
        raise CalibrationError("optimize: sequential=True fits while it calibrates; give batches of real inputs")
    decided = plan(program, asked, statistics, cache=cache, progress=progress)
    rewritten = rewrite(program, decided, cache=cache, progress=progress, verification=verification)
    if tokens is not None and not allow_slower:
        paying = refuse_slower(rewritten, decided, target, tokens, progress=progress)
        if paying is not decided:
            rewritten = rewrite(program, paying, cache=cache, progress=progress, verification=verification)
    artifact = lower(rewritten, target)
    if verification:
        artifact.report = agree(artifact, statistics)
    return artifact
