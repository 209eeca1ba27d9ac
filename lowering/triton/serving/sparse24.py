"""Two of every four inputs, in 16-bit floats: `recast::sparse24_matmul`, and a library's product for many tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recast.kernels.sparse_matmul import library
from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.reference import unpack_bits
from recast.kernels.sparse_matmul.sparse24_op import sparse24_matmul
from recast.lowering.packed import Packed, plain
from recast.lowering.timing import most_tokens
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["SPARSE24", "SPARSE24_LIBRARY", "few_of", "serve"]

SPARSE24 = "triton 2:4 matmul"
SPARSE24_LIBRARY = "triton 2:4 matmul, by a library for many tokens"
_AMONG = (64, 128, 256, 512, 1024, 2048, 4096)


def serve(operator: Operator, *, copies: bool = True) -> Packed | None:
    """Lay out values and places; None for what is not N of every M, and for codes.

    With `copies` the weight is held in the layout of a library of sparse products too, where there is one and it is faster from
    some number of tokens on: 9/8 of the dense bytes in all, instead of 9/16.
    """
    if not isinstance(operator, NMSparse):
        return None
    dtype, values = operator.dtype, operator.values
    if (operator.keep, operator.of) != (2, 4) or operator.features % 4:
        return plain(
            operator, f"aten ({operator.keep} of every {operator.of} of {operator.features} inputs: no kernel)"
        )
    if isinstance(values, Quantized | Codebook):
        return None  # `sparse24_codes` serves these
    if dtype not in (torch.bfloat16, torch.float16) or not isinstance(values, Dense):
        return plain(operator, "aten (2:4 of values that are not 16-bit floats: no kernel yet)")
    places = unpack_bits(operator.indices, 2, values.shape[1])
    words, marks = to_lanes(values.to_dense(), places)
    held, few = {"values": words, "places": marks}, 0
    second = library.packed(operator.to_dense()) if copies else "not asked for"
    if not isinstance(second, str):
        found = few_of(words, marks, *second, dtype, operator.features)
        if found is not None:
            few, held["packed"] = found, second[0]
            if second[1] is not None:
                held["meta"] = second[1]

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        also = tensors.get("packed"), tensors.get("meta")
        y: Tensor = sparse24_matmul(x.to(dtype), tensors["values"], tensors["places"], None, *also, few)
        return y.to(x.dtype)

    return Packed(operator, SPARSE24_LIBRARY if "packed" in held else SPARSE24, held, run)


def few_of(
    words: Tensor, marks: Tensor, packed: Tensor, meta: Tensor | None, dtype: torch.dtype, features: int
) -> int | None:
    """Return the most tokens for which the kernel is faster than the library, measured; None if it is for all that were tried."""

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(tokens, features, dtype=dtype, device=words.device)

        def multiply(few: int) -> Tensor:
            y: Tensor = sparse24_matmul(x, words, marks, None, packed, meta, few)
            return y

        return functools.partial(multiply, tokens), functools.partial(multiply, 0)

    about = "sparse24", str(dtype), features, words.shape[0], meta is None
    found = most_tokens(ways, words.device, *about, among=_AMONG)
    # Below 64 tokens memory decides, and both read the same bytes.
    return None if found == _AMONG[-1] else found or _AMONG[0] // 2
