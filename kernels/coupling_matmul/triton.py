"""The coupling of groups of features: ``out[t, i, f] = sum_j weights[i, j, f] x[t, j, f]``.

Features stand as the blocks before it store them and as the blocks after it load them, group by group. A thread has eight neighbouring
features of every group it adds up, so that sums are its own and each load is one of 16 bytes: no transposition, no exchange. The matrix
unit is of no use, as each feature has a matrix of its own.

This file is imported only where Triton is installed. `recast.kernels.coupling_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["coupling_matmul_kernel"]


@triton.jit
def coupling_matmul_kernel(
    x, weights, out, tokens, to, of, rank, x_stride, to_stride, of_stride,
    TO: tl.constexpr, OF: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """RANK features of TO groups of TOKENS vectors.

    Parameters
    ----------
    x, weights, out
        (tokens, of rank); (to, of, rank) of any strides but that of features, 1; (tokens, to rank).
    to, of
        Groups of the result, and of x.
    OF
        Groups of x that are loaded before they are added up.
    """
    tile, token_tile, to_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    feature = (tile * RANK + tl.arange(0, RANK))[None, None, None, :]
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :, None, None]
    group = (to_tile * TO + tl.arange(0, TO))[:, None, None, None]
    total = tl.zeros((TO, TOKENS, 1, RANK), tl.float32)
    for first in range(0, of, OF):
        other = first + tl.arange(0, OF)[None, None, :, None]
        known = (feature < rank) & (other < of)
        near = weights + group * to_stride + other * of_stride + feature
        numbers = tl.load(near, mask=known & (group < to), other=0.0).to(tl.float32)
        far = x + token * x_stride + other * rank + feature
        vectors = tl.load(far, mask=known & (token < tokens), other=0.0).to(tl.float32)
        total += tl.sum(numbers * vectors, 2, keep_dims=True)
    there = out + token * (to * rank) + group * rank + feature
    tl.store(there, total.to(out.dtype.element_ty), mask=(feature < rank) & (token < tokens) & (group < to))
