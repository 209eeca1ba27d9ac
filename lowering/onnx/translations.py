"""Operations that torch's exporter has no ONNX operators for, written in standard ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to hand to ``torch.onnx.export(custom_translation_table=)``: operations that exist here, and what writes them."""
    names = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
    found = (getattr(getattr(torch.ops, space), name, None) for space, name in names)
    return {packet.default: _grouped_mm for packet in found if packet is not None}


def _grouped_mm(x: Any, weight: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows up to ``offs[0]`` times ``weight[0]``, from there to ``offs[1]`` times ``weight[1]``, and so on: a product an expert.

    Runs of rows are cut out with bounds that are computed as the graph runs, so that each row meets one expert, as in torch. Rows
    after the last run are zero.
    """
    from onnxscript import opset18 as op

    if bias is not None or out_dtype is not None or offs is None or len(weight.shape) != 3:
        raise NotImplementedError("grouped_mm of other operands than rows and a stack of matrices")
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
