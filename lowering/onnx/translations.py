"""Operations that torch's exporter has no ONNX operators for, written in standard ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to hand to ``torch.onnx.export(custom_translation_table=)``: operations that exist here, and what writes them.

    ``aten._grouped_mm`` is not among them: on a CPU it takes bfloat16 alone, which the target refuses.
    """
    packet = getattr(
        torch.ops.transformers, "grouped_mm_fallback", None
    )  # there once transformers' mixtures are loaded
    return {} if packet is None else {packet.default: _grouped_mm}


def _grouped_mm(x: Any, weight: Any, offs: Any) -> Any:
    """Rows up to ``offs[0]`` times ``weight[0]``, from there to ``offs[1]`` times ``weight[1]``, and so on: a product an expert.

    Runs of rows are cut out with bounds that are computed as the graph runs, so that each row meets one expert, as in torch. Rows
    after the last run are zero.
    """
    from onnxscript import opset18 as op

    ends = op.Cast(offs, to=7)  # int64
    axis = op.Constant(value_ints=[0])
    start, parts = axis, []
    for expert in range(int(weight.shape[0])):
        end = op.Gather(ends, op.Constant(value_ints=[expert]), axis=0)
        matrix = op.Gather(weight, op.Constant(value_int=expert), axis=0)
        parts.append(op.MatMul(op.Slice(x, start, end, axis), matrix))
        start = end
    left = op.MatMul(op.Slice(x, start, op.Constant(value_ints=[2**62]), axis), matrix)
    return op.Concat(*parts, op.Sub(left, left), axis=0)
