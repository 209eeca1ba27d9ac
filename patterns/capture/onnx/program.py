"""An ``.onnx`` file as a `Program`: read, run on made-up inputs, captured, and compared with onnxruntime."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.patterns.capture.export import capture
from recast.patterns.capture.onnx.examples import examples, vocabularies
from recast.patterns.capture.onnx.kept import described, is_kept
from recast.patterns.capture.onnx.module import OnnxModule
from recast.patterns.capture.onnx.read import read
from recast.patterns.errors import CaptureError, ModelError, RecastError
from recast.patterns.program import Program

__all__ = ["capture_file", "kept_nodes"]

_CLOSE = 1e-3  # relative; rounding of float32 through a deep model stays below, another function does not


def capture_file(
    path: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    check: bool = True,
) -> Program:
    """Capture an ONNX file; see `recast.capture`.

    The program takes the inputs of the file by name and gives a dictionary of its outputs. Sizes that the file leaves open are free.
    Operators unknown here, and products with matrices that are quantized already, stay what they are: `kept_nodes` lists them.
    """
    file = Path(path)
    if file.suffix != ".onnx":
        raise ModelError(f"capture: '{file}' is no .onnx file; give a torch.nn.Module, or the path of an .onnx file")
    graph = read(file)
    if not graph.inputs:
        raise ModelError(f"onnx: '{file}' takes no inputs: it is a constant, and nothing in it can be made cheaper")
    rows = vocabularies(graph)
    module = OnnxModule(graph).eval()
    if args or kwargs:
        given = dict(zip(module.names.values(), args, strict=False)) | dict(kwargs or {})
        turns = [given, {name: torch.cat([t, t[:1]]) for name, t in given.items() if t.ndim}]
    else:
        turns = [{module.names[n]: t for n, t in examples(graph, rows, turn).items()} for turn in (0, 1)]
    _watch(module, turns, file)
    free = {
        module.names[value.name]: {
            i: torch.export.Dim.AUTO for i, size in enumerate(value.shape) if isinstance(size, str)
        }
        for value in graph.inputs
    }
    inputs = tuple(turns[0][name] for name in module.names.values())
    program = _captured(module, inputs, free if dynamic_shapes is None else dynamic_shapes, check)
    program.label = graph.label
    program.notes += _notes(program)
    if check:
        program.notes += _compared(program, module, file, turns[0])
    return program


def kept_nodes(program: Program) -> list[tuple[str, str, str]]:
    """Graph value, operator and reason of every ONNX operator that was left as it is."""
    return [(node.name, *described(node)) for node in program.graph.nodes if is_kept(node)]


def _watch(module: OnnxModule, turns: list[dict[str, Tensor]], file: Path) -> None:
    """Run on inputs of two sizes: shows that it runs, and how sizes of what is kept follow from others."""
    for turn, given in enumerate(turns):
        module.watch = True
        try:
            with torch.no_grad():
                module(**given)
        except Exception as error:
            if turn:  # sizes may be fixed in ways that the file does not say
                return
            told = str(error) if isinstance(error, RecastError) else f"{type(error).__name__}: {error}"
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
            raise CaptureError(
                f"onnx: '{file}' does not run on inputs made for it ({shapes}): {told}; pass example inputs: "
                "recast.capture(path, (input, ...))"
            ) from error
        finally:
            module.watch = False


def _captured(module: OnnxModule, inputs: tuple[Tensor, ...], shapes: Any, check: bool) -> Program:
    try:
        return capture(module, inputs, dynamic_shapes=shapes, check=check)
    except CaptureError:
        fixed = dict.fromkeys(module.names.values())
        program = capture(module, inputs, dynamic_shapes=fixed, check=check)
        program.notes.append("captured with the example's shapes only: the free sizes of the file could not be traced")
        return program


def _notes(program: Program) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for _, operator, reason in kept_nodes(program):
        counts[operator, reason] = counts.get((operator, reason), 0) + 1
    return [
        f"{count} x {operator} left as {'it is' if count == 1 else 'they are'}: {reason}"
        for (operator, reason), count in counts.items()
    ]


def _compared(program: Program, module: OnnxModule, file: Path, given: dict[str, Tensor]) -> list[str]:
    """Compare with the file itself in onnxruntime; a note if they differ by more than rounding, or if there is none."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ["not compared with the file itself: onnxruntime is not installed"]
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
        taken = {value.name for value in session.get_inputs()}
        feeds = {name: given[plain].numpy() for name, plain in module.names.items() if name in taken}
        wanted = dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))
    except Exception as error:  # noqa: BLE001  # onnxruntime has a class for every status
        return [f"not compared with the file itself: ONNX Runtime does not run it ({str(error).splitlines()[0]})"]
    with torch.no_grad():
        found = program(**given)
    for name, value in wanted.items():
        gap = _error(torch.as_tensor(value), found[name])
        if gap > _CLOSE:
            return [f"result '{name}' differs by {gap:.1e} from what ONNX Runtime gives for the file"]
    return []


def _error(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.double(), found.double()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    kept = torch.isfinite(a)
    return float((a - b)[kept].norm() / a[kept].norm().clamp(min=1e-30)) if bool(kept.any()) else 0.0
