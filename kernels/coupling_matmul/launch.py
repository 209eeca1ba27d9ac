"""Calls the Triton kernel that couples groups of features.

For b groups of r features the weights are ``b² r`` numbers, a vector ``b r`` before and after. BLAST's 4096 x 4096 at half of its
parameters has b = 16 and r = 993: 0.5 MB of weights beside 15.9 MB of blocks, 32 KB a token. The library has a batched product for it,
r matrices of 16 x 16, whose operands must be contiguous in rows or columns: x and the weights are copied into another order before it
and the result after it, four launches and 1.5 MB for the weights alone. One kernel takes and gives the blocks' own order and reads all
once: a token's time there is that of a launch. A number of x that comes with a number of the result is multiplied b times, 16 for 4
bytes where an H200 has 25: with many tokens it is bound by memory as well.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recast.kernels.tiles import on_device

__all__ = ["DTYPES", "FEW", "MANY", "Piece", "launch", "piece_for", "width_of"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Piece(NamedTuple):
    """What a block of the kernel, one warp, handles: groups of the result, groups of x at a time, and vectors."""

    to: int
    of: int
    tokens: int


# Few vectors: blocks for every group, all loads of which are under way at once. Many: each number loaded is used four times.
FEW, MANY = Piece(1, 16, 1), Piece(4, 1, 4)
_FEW_TOKENS = 16


def piece_for(tokens: int) -> Piece:
    """Return what a block handles for a number of vectors.

    Examples
    --------
    >>> piece_for(1), piece_for(4096)
    (Piece(to=1, of=16, tokens=1), Piece(to=4, of=1, tokens=4))
    """
    return FEW if tokens <= _FEW_TOKENS else MANY


def width_of(dtype: torch.dtype) -> int:
    """Return the features of a block: 16 bytes for each of 32 threads."""
    return 32 * 16 // dtype.itemsize


def launch(x: Tensor, weights: Tensor, *, piece: Piece | None = None) -> Tensor:
    """Couple groups of features.

    Parameters
    ----------
    x
        (tokens, J r), float32, float16 or bfloat16.
    weights
        (I, J, r) in x's dtype; features contiguous, groups in any strides: with them exchanged it is the gradient of x.
    piece
        Chosen by the number of tokens if not given.

    Returns
    -------
    (tokens, I r) in x's dtype.
    """
    from recast.kernels.coupling_matmul.triton import coupling_matmul_kernel

    (to, of, rank), tokens = weights.shape, x.shape[0]
    out = x.new_empty((tokens, to * rank))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    piece = piece or piece_for(tokens)
    width = width_of(x.dtype)
    grid = -(-rank // width), -(-tokens // piece.tokens), -(-to // piece.to)
    with on_device(x):
        coupling_matmul_kernel[grid](
            x, weights, out, tokens, to, of, rank, x.stride(0), weights.stride(0), weights.stride(1),
            TO=piece.to, OF=piece.of, TOKENS=piece.tokens, RANK=width, num_warps=1,
        )  # fmt: skip
    return out
