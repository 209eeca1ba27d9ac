"""Codes of integers, floats or a table: `recast::dequantizing_matmul`, with a low-rank term in the same pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from recast.kernels.codebook_matmul.reference import decode_scales
from recast.kernels.quantized_matmul.dequantizing_op import dequantizing_matmul
from recast.kernels.quantized_matmul.lanes import to_lanes
from recast.kernels.quantized_matmul.launch import pairs_of
from recast.kernels.quantized_matmul.reference import unpack_codes
from recast.lowering.packed import Packed, plain
from recast.lowering.timing import most_tokens
from recast.lowering.triton.float8 import converts, e4m3_of
from recast.passes.forms.algebra import Product, Sum
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["DEQUANTIZING", "PAIRED", "WITH_LOW_RANK", "Codes", "codes_of", "refused", "serve"]

DEQUANTIZING = "triton dequantizing matmul"
WITH_LOW_RANK = "triton dequantizing matmul with low-rank term"

PAIRED = {torch.ops.recast.dequantizing_matmul.default: {"values": 0, "high_values": 0, "scale": 1, "zero": 1}}


def serve(operator: Operator) -> Packed | None:
    """Lay out codes, or a sum of codes and a product of two dense factors; None for anything else."""
    if isinstance(operator, Sum):
        return _with_low_rank(operator)
    if not isinstance(operator, Quantized | Codebook) or getattr(operator, "activations", False):
        return None
    reason = refused(operator)
    return _dequantizing(operator) if reason is None else plain(operator, f"aten ({reason})")


def refused(operator: Quantized | Codebook) -> str | None:
    """Why the kernel does not take codes, None where it does."""
    if isinstance(operator, Quantized) and operator.activations:
        return "rounded activations: no kernel yet"
    if operator.group is not None and operator.group % 16 and operator.group < operator.shape[1]:
        return f"groups of {operator.group} are no multiple of 16"
    if isinstance(operator, Codebook):
        if tuple(operator.table.shape[:2]) != (1, 1) or operator.table.shape[3] != 1:
            return "tables of vectors, or several: no kernel yet"
        if operator.bits not in (2, 3, 4, 8):
            return f"codes of {operator.bits} bits: no kernel"
    return None


def _dequantizing(operator: Quantized | Codebook) -> Packed:
    held, bits, group, kind = _held(operator)
    few = _few(held, operator.dtype, operator.shape[1], bits, group, kind)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = (tensors.get(name) for name in ("high_values", "scale", "zero", "table", "pairs"))
        y: Tensor = dequantizing_matmul(x, tensors["values"], *parts, None, None, None, bits, group, kind, few)
        return y

    return Packed(operator, DEQUANTIZING, held, run)


def _with_low_rank(operator: Sum) -> Packed | None:
    """Codes and a product of two dense factors, added in one pass."""
    codes = [part for part in operator.parts if isinstance(part, Quantized | Codebook) and refused(part) is None]
    factors = [part for part in operator.parts if isinstance(part, Product)]
    if len(operator.parts) != 2 or len(codes) != 1 or len(factors) != 1:
        return None
    left, right = factors[0].left, factors[0].right
    if not isinstance(left, Dense) or not isinstance(right, Dense):
        return None
    held, bits, group, kind = _held(codes[0])
    few = _few(held, operator.dtype, operator.shape[1], bits, group, kind)
    held = {**held, "left": left.to_dense().contiguous(), "right": right.to_dense().contiguous()}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = (tensors.get(name) for name in ("high_values", "scale", "zero", "table", "pairs"))
        factors = tensors["left"], tensors["right"]
        y: Tensor = dequantizing_matmul(x, tensors["values"], *parts, None, *factors, bits, group, kind, few)
        return y

    return Packed(operator, WITH_LOW_RANK, held, run)


def _held(operator: Quantized | Codebook) -> tuple[dict[str, Tensor], int, int, str]:
    """Tensors as the kernel takes them, bits, inputs of a group and the kind of code."""
    found = _as_floats(operator, codes_of(operator))
    words, high_words = to_lanes(found.codes, operator.bits)
    held = {
        "values": words, "high_values": high_words, "scale": found.scale, "zero": found.zero, "table": found.table,
        "pairs": found.pairs,
    }  # fmt: skip
    return {name: tensor for name, tensor in held.items() if tensor is not None}, operator.bits, found.group, found.kind


def _as_floats(operator: Quantized | Codebook, found: Codes) -> Codes:
    """The same numbers as bits of e4m3, where they are such and the GPU converts them."""
    if not isinstance(operator, Codebook) or operator.bits != 8 or not converts(operator.table.device):
        return found
    as_e4m3 = e4m3_of(operator)
    if as_e4m3 is None:
        return found
    entries, unit = as_e4m3
    codes = entries.view(torch.uint8)[found.codes.to(torch.int64)]
    if found.scale is None:
        return Codes(
            codes, 0, "float", found.codes.new_full((1, len(codes)), unit, dtype=torch.float32), None, None, None
        )
    return Codes(codes, found.group, "float", found.scale.float() * unit, None, None, None)


class Codes(NamedTuple):
    """Codes before they are laid out.

    Attributes
    ----------
    codes
        (m, n), from zero on.
    group, kind
        Inputs that share a scale, 0 for all; "integer", "table" or "float".
    scale, zero, table, pairs
        As `dequantizing_matmul` takes them.
    """

    codes: Tensor
    group: int
    kind: str
    scale: Tensor | None
    zero: Tensor | None
    table: Tensor | None
    pairs: Tensor | None


def codes_of(operator: Quantized | Codebook) -> Codes:
    """Take codes, scales and tables out of an operator."""
    bits, n = operator.bits, operator.shape[1]
    group = 0 if operator.group is None or operator.group >= n else operator.group
    if isinstance(operator, Codebook):
        scale = operator.scale
        if scale is not None and operator.step is not None and operator.mean is not None:
            scale = decode_scales(scale, operator.step, operator.mean)
        half = operator.compute in (torch.bfloat16, torch.float16)
        table = operator.table.reshape(-1).to(operator.compute if half else operator.table.dtype)
        pairs = pairs_of(table) if half and bits < 8 else None
        scale = None if scale is None else scale.T.contiguous()
        return Codes(unpack_codes(operator.values, bits, n), group, "table", scale, None, table, pairs)
    operator = operator.by_row()
    # Eight bits count from the middle, as the fewer bits do.
    codes = operator.values.to(torch.int16) + 128 if bits == 8 else unpack_codes(operator.values, bits, n)
    zero = None if operator.zero is None else operator.zero.T.to(torch.bfloat16).contiguous()
    return Codes(codes, group, "integer", operator.scale.T.contiguous(), zero, None, None)


def _few(held: Mapping[str, Tensor], dtype: torch.dtype, features: int, bits: int, group: int, kind: str) -> int:
    """The most tokens for which decoding in the product is faster than writing the weight out first; 0, always, without a GPU."""
    values = held["values"]
    if values.device.type != "cuda":
        return 0
    parts = [held.get(name) for name in ("high_values", "scale", "zero", "table", "pairs")]

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(tokens, features, dtype=dtype, device=values.device)

        def multiply(few: int) -> Tensor:
            y: Tensor = dequantizing_matmul(x, values, *parts, None, None, None, bits, group, kind, few)
            return y

        return functools.partial(multiply, tokens), functools.partial(multiply, 1)

    about = "dequantizing", bits, group, kind, str(dtype), features, values.shape[0], *sorted(held)
    # Below 64 tokens the product itself is bound by memory: writing out moves five times the bytes.
    return most_tokens(ways, values.device, *about, among=(64, 128, 256, 512, 1024, 2048, 4096)) or 32
