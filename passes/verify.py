"""Verification after every pass: structure, metadata, interface, ownership, numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.passes.base import Context, Pass, Soundness
from recast.passes.meta import fake_values
from recast.passes.report import fidelity
from recast.patterns.errors import VerificationError
from recast.patterns.linear.packing import size_hint
from recast.patterns.printer import type_text
from recast.patterns.program import Program

__all__ = ["exact_bound", "inputs_of", "probe_inputs", "verify"]


def exact_bound(dtype: torch.dtype) -> float:
    """Largest relative error that an exact pass may cause in a whole model's output: 2**10 units in the last place.

    An exact rewrite changes the order of summation only. One product of K terms differs by about sqrt(K) units; 2**10 leaves
    room for K up to 2**16 and some dozens of layers, and is 1.2e-4 in float32.
    """
    return float(torch.finfo(dtype).eps) * 2**10


def verify(before: Program, after: Program, step: Pass, done: list[str], context: Context) -> dict[str, Any]:
    """Check what a pass must leave intact.

    Returns
    -------
    dict
        What was checked, with the figures.

    Raises
    ------
    VerificationError
        Naming the pass, the place, and the passes before it; both graphs are written to a folder.
    """
    try:
        _structure(after)
        _metadata(after)
        _interface(before, after)
        owned = _ownership(before, after)
        numbers = _numbers(before, after, step, context)
    except VerificationError as error:
        folder = _dump(before, after, step, done, context)
        raise VerificationError(
            f"verification: pass '{step}' broke the program: {error}; passes before it: {', '.join(done) or 'none'}; "
            f"graphs before and after are in {folder} (diff before.txt after.txt)"
        ) from error
    return {"soundness": step.soundness.value, "verified": True, **owned, **numbers}


def _structure(program: Program) -> None:
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            if node not in operand.users:
                raise VerificationError(f"'{node.name}' uses '{operand.name}', which does not know it")


def _metadata(program: Program) -> None:
    for node, value in fake_values(program).items():
        known = node.meta.get("val")
        if not isinstance(value, Tensor) or node.op == "placeholder":
            continue
        if not isinstance(known, Tensor) or known.dtype != value.dtype or not _same_shape(known, value):
            raise VerificationError(f"'{node.name}' is noted as {type_text(known)} but computes {type_text(value)}")


def _same_shape(a: Tensor, b: Tensor) -> bool:
    # Equal in the example is what can be decided without adding guards to the shape environment.
    return a.ndim == b.ndim and all(size_hint(x) == size_hint(y) for x, y in zip(a.shape, b.shape, strict=True))


def _interface(before: Program, after: Program) -> None:
    names = [[n.name for n in p.inputs()] for p in (before, after)]
    if names[0] != names[1]:
        raise VerificationError(f"inputs changed from {names[0]} to {names[1]}")
    outputs = [next(iter(p.graph.find_nodes(op="output"))).args[0] for p in (before, after)]
    if len(outputs[0]) != len(outputs[1]):
        raise VerificationError(f"the number of outputs changed from {len(outputs[0])} to {len(outputs[1])}")
    for i, (a, b) in enumerate(zip(*outputs, strict=True)):
        old, new = (v.meta.get("val") if hasattr(v, "meta") else v for v in (a, b))
        if isinstance(old, Tensor) and (old.dtype != new.dtype or not _same_shape(old, new)):
            raise VerificationError(f"output {i} changed from {type_text(old)} to {type_text(new)}")


def _ownership(before: Program, after: Program) -> dict[str, int]:
    """Each original parameter is kept, or replaced by an operator, or dropped because nothing reads it."""
    old, new = set(before.weights), set(after.weights)
    if extra := new - old:
        raise VerificationError(f"weights {sorted(extra)} appeared from nowhere")
    return {"weights_kept": len(new), "weights_replaced": len(old - new)}


def _numbers(before: Program, after: Program, step: Pass, context: Context) -> dict[str, float]:
    probe = inputs_of(before, context)
    with torch.no_grad():
        reference = before.module(*_fresh(probe))
        found = after.module(*_fresh(probe))
    worst = 0.0
    for i, (a, b) in enumerate(zip(reference, found, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if not a.is_floating_point():
            if step.soundness is Soundness.EXACT and not torch.equal(a, b):
                raise VerificationError(f"output {i} differs, though the pass is exact")
            continue
        if bool(torch.isfinite(a).all()) and not bool(torch.isfinite(b).all()):
            raise VerificationError(f"output {i} is no longer finite")
        error = fidelity(a, b)["relative_error"] if a.numel() and bool(torch.isfinite(a).all()) else 0.0
        worst = max(worst, error)
        if step.soundness is Soundness.EXACT and error > exact_bound(a.dtype):
            raise VerificationError(
                f"output {i} differs by {error:.3g} (relative), an exact pass may cause {exact_bound(a.dtype):.3g}"
            )
    if step.soundness is Soundness.LOSSY:
        _within_prediction(context)
    return {"output_error": worst}


def _within_prediction(context: Context) -> None:
    """The measured error of each site must be what the plan predicted, up to sampling."""
    for row in context.notes.get("apply_forms", []):
        if row.measured_error is None:
            continue
        # The sample is a part of the data the prediction was made on: twice the figure is beyond chance.
        bound = 2 * row.predicted_error + 2**8 * torch.finfo(torch.float32).eps
        if row.measured_error > bound and row.bytes_before > 0:
            raise VerificationError(
                f"site '{row.name}' ({row.form}) has a measured error of {row.measured_error:.3g}, {row.predicted_error:.3g} was predicted"
            )


def inputs_of(program: Program, context: Context) -> list[Any]:
    """The first calibration batch, or random inputs where there is none."""
    if context.calibration is not None and context.calibration.probe:
        return context.calibration.probe
    return probe_inputs(program)


def probe_inputs(program: Program, seed: int = 0) -> list[Any]:
    """Random inputs of the captured example's shapes; integers are small, so that they are valid in any vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for position, node in enumerate(program.inputs()):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            made.append(value.node.hint)
            continue
        if not isinstance(value, Tensor):
            made.append(program.interface.constants.get(position))
            continue
        shape = [size_hint(s) for s in value.shape]
        if value.is_floating_point():
            made.append(torch.randn(shape, generator=generator).to(value.dtype))
        elif value.dtype == torch.bool:
            made.append(torch.ones(shape, dtype=torch.bool))
        else:
            made.append(torch.randint(1, 2, shape, generator=generator).to(value.dtype))
    return made


def _fresh(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _dump(before: Program, after: Program, step: Pass, done: list[str], context: Context) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="recast-verification-"))
    (folder / "before.txt").write_text(str(before), encoding="utf-8")
    (folder / "after.txt").write_text(str(after), encoding="utf-8")
    (folder / "plan.yaml").write_text(str(context.plan), encoding="utf-8")
    (folder / "pipeline.txt").write_text(",".join([*done, str(step)]) + "\n", encoding="utf-8")
    return folder
