"""Weights and inputs of eight bits: `recast::eight_bit_matmul` between rounding the inputs and scaling by token."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.quantized_matmul.floats import FloatGrid, rounded_product
from recast.kernels.quantized_matmul.reference import unpack_codes
from recast.kernels.tiles import interpreting
from recast.lowering.dynamic_int8 import dynamic_int8
from recast.lowering.packed import Packed, plain
from recast.lowering.triton.few import ALWAYS, measured_few
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.rounded_inputs import RoundedInputs

__all__ = ["FLOATS", "INTEGERS", "serve"]

INTEGERS = "triton int8 x int8 matmul"
FLOATS = "triton fp8 x fp8 matmul"
_E4M3 = FloatGrid(mantissa=3, lowest=-6, largest=448.0)


def serve(operator: Operator) -> Packed | None:
    """Lay out int8 weights whose inputs are rounded too, and e4m3 ones; None for anything else."""
    if isinstance(operator, Quantized) and operator.activations:
        if not operator.symmetric or operator.scale.shape[1] != 1:
            return plain(operator, "aten (rounded activations and scales by group: no kernel)")
        few = _few(operator.values, operator.by_row().scale[:, 0].float())
        return dynamic_int8(operator, INTEGERS, functools.partial(eight_bit_matmul, few=few))
    if isinstance(operator, RoundedInputs) and isinstance(operator.weight, Codebook) and operator.grid == _E4M3:
        return _floats(operator, operator.weight)
    return None


def _floats(operator: RoundedInputs, weight: Codebook) -> Packed | None:
    """None where the table holds other numbers than e4m3's, or the GPU multiplies none."""
    eight = torch.float8_e4m3fn
    table = weight.table.reshape(-1).float()
    unit = float(table.abs().max()) / _E4M3.largest  # tables are scaled to a largest entry of one
    entries = (table / (unit or 1.0)).to(eight)
    exact = bool(((entries.float() * unit - table).abs() <= 1e-6 * table.abs()).all())
    exact = exact and tuple(weight.table.shape[:2]) == (1, 1)
    by_row = weight.scale is None or (weight.step is None and weight.scale.shape[1] == 1)
    if not exact or not by_row or weight.table.shape[3] != 1 or not _multiplies_floats(table.device):
        return None
    codes = unpack_codes(weight.values, weight.bits, weight.shape[1])
    scale = table.new_ones(weight.shape[0]) if weight.scale is None else weight.scale[:, 0].float().contiguous()
    held = {"values": entries[codes.to(torch.int64)], "scale": scale * unit}
    few = _few(held["values"], held["scale"])

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        def product(values: Tensor) -> Tensor:
            y: Tensor = eight_bit_matmul(values.to(eight), tensors["values"], tensors["scale"], few)
            return y

        return rounded_product(x, operator.grid, product)

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
