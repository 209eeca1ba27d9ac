"""Coefficients at the bits set in a bitmap after a dense dictionary (CoSpaDi): the library's product, then `recast::bitmap_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recast.kernels.bitmap_matmul.bitmap_op import bitmap_matmul
from recast.kernels.bitmap_matmul.launch import DTYPES
from recast.kernels.bitmap_matmul.reference import to_quads
from recast.kernels.sparse_matmul.reference import unpack_bits
from recast.lowering.packed import Packed, plain
from recast.lowering.timing import most_tokens
from recast.passes.forms.algebra import Product
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.unstructured import BitmapSparse

__all__ = ["DICTIONARY", "serve"]

DICTIONARY = "triton bitmap matmul after a dictionary"
# Where nothing is measured: writing out moves three and a half times the coefficients' bytes, decoding is for every 64 tokens.
_FEW = 128


def serve(operator: Operator) -> Packed | None:
    """Lay coefficients and marks out; None for what is no product of a bitmap's matrix and a dense one."""
    if not isinstance(operator, Product) or not isinstance(operator.left, BitmapSparse):
        return None
    codes, dictionary = operator.left, operator.right
    if not isinstance(codes.values, Dense) or not isinstance(dictionary, Dense):
        return None  # each is served for itself
    dtype, (m, n) = operator.dtype, codes.shape
    if dtype not in DTYPES:
        return plain(operator, f"aten (dictionary in {str(dtype).removeprefix('torch.')}: no kernel)")
    mask = unpack_bits(codes.bitmap, 1, n) == 1
    values, words, starts = to_quads(codes.values.to_dense().reshape(-1), mask)
    held = {"values": values, "words": words, "starts": starts, "dictionary": dictionary.to_dense()}
    few = _few(held, m, n)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.nn.functional.linear(x, tensors["dictionary"].to(x.dtype))
        y: Tensor = bitmap_matmul(inner, tensors["values"], tensors["words"], tensors["starts"], None, m, few)
        return y

    return Packed(operator, DICTIONARY, held, run)


def _few(held: Mapping[str, Tensor], rows: int, atoms: int) -> int:
    """The most tokens for which decoding in the product is faster than writing the coefficients out first."""
    values = held["values"]
    if values.device.type != "cuda":
        return _FEW

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inner = torch.randn(tokens, atoms, dtype=values.dtype, device=values.device)

        def multiply(few: int) -> Tensor:
            y: Tensor = bitmap_matmul(inner, *(held[name] for name in ("values", "words", "starts")), None, rows, few)
            return y

        return functools.partial(multiply, tokens), functools.partial(multiply, 1)

    about = "bitmap", str(values.dtype), rows, atoms, values.shape[0]
    # Fewer tokens than these take the time of reading what is packed: written out it is several times more.
    return most_tokens(ways, values.device, *about, among=(32, 64, 128, 256, 512, 1024)) or 16
