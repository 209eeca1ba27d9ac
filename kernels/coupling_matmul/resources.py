"""The configurations of the kernel that couples groups, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.coupling_matmul.launch import FEW, MANY, Piece, width_of
from recast.kernels.offline import Case

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Few and many vectors in bfloat16 and float32."""
    for dtype, number, words in ((torch.bfloat16, "*bf16", ""), (torch.float32, "*fp32", " in float32")):
        for piece, many in ((FEW, "few"), (MANY, "many")):
            yield _case(piece, dtype, number, f"coupling{words}, {many} tokens")


def _case(piece: Piece, dtype: torch.dtype, number: str, name: str) -> Case:
    pointers = dict.fromkeys(("x", "weights", "out"), number)
    strides = ("rank", "x_stride", "to_stride", "of_stride")
    width = width_of(dtype)
    return Case(
        kernel="recast.kernels.coupling_matmul.triton:coupling_matmul_kernel",
        name=name,
        signature=pointers | dict.fromkeys(("tokens", "to", "of", *strides), "i32"),
        constants={"TO": piece.to, "OF": piece.of, "TOKENS": piece.tokens, "RANK": width},
        aligned=(*pointers, *strides),
        num_warps=1,
        num_stages=1,
        weights=piece.to * piece.of * width // 32,
        multiplies=False,
    )
