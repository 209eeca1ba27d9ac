"""Weights and inputs of eight bits: `recast::eight_bit_matmul` after rounding the inputs, which it undoes itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.quantized_matmul.floats import FloatGrid, float_tokens
from recast.kernels.quantized_matmul.reference import quantize_tokens, unpack_codes
from recast.kernels.tiles import interpreting
from recast.lowering.packed import Packed, plain
from recast.lowering.triton.few import ALWAYS, measured_few
from recast.lowering.triton.float8 import e4m3_of
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.rounded_inputs import RoundedInputs

__all__ = ["FLOATS", "INTEGERS", "PAIRED", "serve"]

INTEGERS = "triton int8 x int8 matmul"
FLOATS = "triton fp8 x fp8 matmul"
PAIRED = {torch.ops.recast.eight_bit_matmul.default: {"weight": 0, "scale": 0, "offset": 0}}
_E4M3 = FloatGrid(mantissa=3, lowest=-6, largest=448.0)


def serve(operator: Operator) -> Packed | None:
    """Lay out int8 weights whose inputs are rounded too, and e4m3 ones; None for anything else."""
    if isinstance(operator, Quantized) and operator.activations:
        if not operator.symmetric or operator.scale.shape[1] != 1:
            return plain(operator, "aten (rounded activations and scales by group: no kernel)")
        return _integers(operator)
    if isinstance(operator, RoundedInputs) and isinstance(operator.weight, Codebook) and operator.grid == _E4M3:
        return _floats(operator, operator.weight)
    return None


def _integers(operator: Quantized) -> Packed:
    """Tokens are rounded by steps, and from a zero, of their own: ``y = (sum q w - z sum w) s_x s_w``."""
    per_token, scale = operator.per_token, operator.by_row().scale[:, 0].float()
    held = {"values": operator.values, "scale": scale, "offset": operator.values.sum(1).float() * scale}
    few = _few(operator.values, scale)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        codes, step, zero = quantize_tokens(x, per_token=per_token)
        parts = tensors["values"], tensors["scale"], few, step, zero, tensors["offset"]
        y: Tensor = eight_bit_matmul(codes, *parts, x.dtype)
        return y

    return Packed(operator, INTEGERS, held, run)


def _floats(operator: RoundedInputs, weight: Codebook) -> Packed | None:
    """None where the table holds other numbers than e4m3's, or the GPU multiplies none."""
    found = e4m3_of(weight)
    by_row = weight.scale is None or (weight.step is None and weight.scale.shape[1] == 1)
    if found is None or not by_row or not _multiplies_floats(weight.table.device):
        return None
    entries, unit = found
    codes = unpack_codes(weight.values, weight.bits, weight.shape[1])
    scale = (
        entries.new_ones(weight.shape[0], dtype=torch.float32)
        if weight.scale is None
        else weight.scale[:, 0].float().contiguous()
    )
    held = {"values": entries[codes.to(torch.int64)], "scale": scale * unit}
    few = _few(held["values"], held["scale"])

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        values, step = float_tokens(x, operator.grid)
        parts = tensors["values"], tensors["scale"], few, step, None, None
        y: Tensor = eight_bit_matmul(values.to(torch.float8_e4m3fn), *parts, x.dtype)
        return y

    return Packed(operator, FLOATS, held, run)


def _few(values: Tensor, scale: Tensor) -> int:
    """Up to how many tokens the kernel is faster than the library's product of eight-bit numbers."""

    def multiply(x: Tensor, few: int) -> Tensor:
        y: Tensor = eight_bit_matmul(x.to(values.dtype), values, scale, few)
        return y

    few = measured_few(
        multiply, values.shape[1], torch.bfloat16, values.device, "eight bits", len(values), values.dtype
    )
    return ALWAYS if few is None else few


def _multiplies_floats(device: torch.device) -> bool:
    if device.type != "cuda":
        return interpreting()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
