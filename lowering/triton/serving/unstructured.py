"""Values at any places, marked in a bitmap or held in tiles: `recast::unstructured_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recast.kernels.unstructured_matmul.lanes import to_lanes
from recast.kernels.unstructured_matmul.launch import MOST_TOKENS
from recast.kernels.unstructured_matmul.unstructured_op import unstructured_matmul
from recast.lowering.packed import Packed, plain
from recast.lowering.timing import most_tokens
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.unstructured import BitmapSparse, TiledSparse

__all__ = ["UNSTRUCTURED", "few_of", "serve"]

UNSTRUCTURED = "triton unstructured matmul"
_HELD = ("values", "words", "starts", "offsets")
_AMONG = (8, 16, 32, 64)


def serve(operator: Operator) -> Packed | None:
    """Lay out values and their bitmap; None for what has no values at any places."""
    if not isinstance(operator, BitmapSparse | TiledSparse):
        return None
    dtype, (rows, _) = operator.dtype, operator.shape
    if not isinstance(operator.values, Dense):
        return plain(operator, "aten (packed values at any places: no kernel)")
    if dtype not in MOST_TOKENS:
        return plain(operator, f"aten (values at any places in {str(dtype).removeprefix('torch.')}: no kernel)")
    held = dict(zip(_HELD, to_lanes(operator.to_dense()), strict=True))
    few = few_of(held, operator.shape)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = unstructured_matmul(x.to(dtype), *(tensors[name] for name in _HELD), None, rows, few)
        return y.to(x.dtype)

    return Packed(operator, UNSTRUCTURED, held, run)


def few_of(held: Mapping[str, Tensor], shape: tuple[int, int]) -> int:
    """Return the most tokens for which decoding in the product is faster than writing the weight out first; the most, without a GPU."""
    values, (rows, features) = held["values"], shape
    most = MOST_TOKENS[values.dtype]
    if values.device.type != "cuda":
        return most

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(tokens, features, dtype=values.dtype, device=values.device)

        def multiply(few: int) -> Tensor:
            y: Tensor = unstructured_matmul(x, *(held[name] for name in _HELD), None, rows, few)
            return y

        return functools.partial(multiply, tokens), functools.partial(multiply, 0)

    # Of densities those alike are timed once.
    about = "unstructured", str(values.dtype), rows, features, round(20 * len(values) / max(1, rows * features))
    # Below 8 tokens memory decides: writing out moves three times the bytes.
    return (
        most_tokens(ways, values.device, *about, among=[tokens for tokens in _AMONG if tokens <= most])
        or _AMONG[0] // 2
    )
