"""Packed weights under Inductor on a CPU, laid out for `recast::weight_only_matmul`; and from how many tokens on it writes them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recast.kernels.codebook_matmul.reference import decode_scales
from recast.kernels.quantized_matmul import few_tokens, rounded_tokens
from recast.kernels.quantized_matmul.blocks import BLOCK, to_blocks
from recast.kernels.quantized_matmul.reference import unpack_codes
from recast.kernels.quantized_matmul.weight_only_op import weight_only_matmul
from recast.lowering.packed import Packed
from recast.lowering.timing import most_tokens
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.quantized import Quantized

__all__ = ["PACKED", "ROUNDED", "weight_only"]

PACKED = "recast weight-only matmul"
ROUNDED = "recast weight-only matmul, few tokens rounded to bytes"
_PARTS = ("scale", "zero", "table", "dense")


def weight_only(operator: Quantized | Codebook, *, keep_dense: bool = False, rounded: bool = False) -> Packed | None:
    """Lay codes out by blocks of 32 inputs; None where the kernel does not take them or does not run.

    With `keep_dense` the weight is written out as well, once, for many tokens. With `rounded` few tokens are rounded to bytes before
    they meet integers, where this CPU has such products.
    """
    n = operator.shape[1]
    group = 0 if operator.group is None or operator.group >= n else operator.group
    if any(tensor.device.type != "cpu" for tensor in operator.tensors().values()) or few_tokens.unavailable():
        return None
    if group % BLOCK or operator.bits not in (2, 3, 4, 8):
        return None
    if isinstance(operator, Codebook):
        if tuple(operator.table.shape[:2]) != (1, 1) or operator.table.shape[3] != 1:
            return None
        held = _looked_up(operator)
    else:
        held = _integers(operator)
    held["codes"] = to_blocks(held["codes"], operator.bits, group)
    if keep_dense:
        held["dense"] = operator.to_dense().contiguous()
    rounded = rounded and "table" not in held and rounded_tokens.unavailable() is None
    bits, few = operator.bits, _few(held, operator.bits, n, rounded)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = (tensors.get(name) for name in _PARTS)
        y: Tensor = weight_only_matmul(x, tensors["codes"], *parts, bits, few, rounded)
        return y

    return Packed(operator, ROUNDED if rounded else PACKED, held, run)


def _integers(operator: Quantized) -> dict[str, Tensor]:
    operator = operator.by_row()
    if operator.bits == 8:  # from the middle on, as fewer bits are
        codes = (operator.values.to(torch.int16) + 128).to(torch.uint8)
    else:
        codes = unpack_codes(operator.values, operator.bits, operator.shape[1])
    found = {"codes": codes, "scale": operator.scale.to(torch.float32).contiguous()}
    if operator.zero is not None:
        middle = 128 if operator.bits == 8 else 0
        found["zero"] = (operator.zero.to(torch.float32) + middle).contiguous()
    return found


def _looked_up(operator: Codebook) -> dict[str, Tensor]:
    scale = operator.scale
    if scale is not None and operator.step is not None and operator.mean is not None:
        scale = decode_scales(scale, operator.step, operator.mean)
    if scale is None:
        scale = operator.table.new_ones((operator.shape[0], 1))
    return {
        "codes": unpack_codes(operator.values, operator.bits, operator.shape[1]),
        "scale": scale.to(torch.float32).contiguous(),
        "table": operator.table.reshape(-1).to(torch.float32).contiguous(),
    }


def _few(held: Mapping[str, Tensor], bits: int, features: int, rounded: bool) -> int:
    """The most tokens for which decoding in registers is faster than writing out."""
    codes = held["codes"]
    parts = [held.get(name) for name in _PARTS]

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(tokens, features)
        return (
            lambda: weight_only_matmul(x, codes, *parts, bits, tokens, rounded),
            lambda: weight_only_matmul(x, codes, *parts, bits, 0),
        )

    about = ("weight only", rounded, bits, tuple(codes.shape), tuple(held["scale"].shape), *sorted(held))
    return most_tokens(
        ways, codes.device, *about, among=(4, 8, 16, 32, 64, 128, 256) if rounded else (4, 8, 16, 32, 64, 128)
    )
