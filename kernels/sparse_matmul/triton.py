"""The product of 16-bit activations with a 2:4 weight in lane order, written out in registers on its way to the matrix units.

``y[t, r] = sum_g sum_{i < 2} value[r, g, i] x[t, 4 g + place[r, g, i]] + bias[r]``. Nine sixteenths of the dense bytes are read:
that is what makes it faster where bandwidth decides, with few tokens. Writing out takes some ten operations for four inputs, where
a GPU has about 25 in the time that memory needs to bring them.

This file is imported only where Triton is installed. `recast.kernels.sparse_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import store_tile
from recast.kernels.quantized_matmul.triton import lane_words, one_of_words

__all__ = ["sparse24_matmul_kernel"]


@triton.jit
def _sixteens(words, later_words, marks, FIRST: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` sixteens of inputs: (ROWS, lane, half, pair, and a two for each halving, the finest first)."""
    if COUNT == 1:
        if FIRST < 4:
            word = one_of_words(words, FIRST, 4, ROWS)
        else:
            word = one_of_words(later_words, FIRST - 4, 4, ROWS)
        kept = ((marks >> FIRST) & 0x00010001) * 0xFFFF
        alike = (marks << (23 - FIRST)) >> 31  # all bits, or none
        exchanged = (word << 16) | ((word >> 16) & 0xFFFF)
        lower = word & kept
        upper = (word ^ ((word ^ exchanged) & alike)) & (kept ^ ~alike)
        low0, high0 = lower.to(tl.int16).to(DTYPE, bitcast=True), (lower >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        low1, high1 = upper.to(tl.int16).to(DTYPE, bitcast=True), (upper >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(tl.join(low0, high0), tl.join(low1, high1))
    else:
        HALF: tl.constexpr = COUNT // 2
        first = _sixteens(words, later_words, marks, FIRST, HALF, ROWS, DTYPE)
        return tl.join(first, _sixteens(words, later_words, marks, FIRST + HALF, HALF, ROWS, DTYPE))


@triton.jit
def sparse24_matmul_kernel(
    x, values, places, outer, bias, out,
    tokens, rows, features, blocks,
    x_stride, values_stride, places_stride, out_stride, split_stride, per_split,
    OUTER: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, values, places, bias, out
        (tokens, features); int32 (rows, 32 blocks) and (rows, 4 blocks) in lane order; (rows,); (tokens, rows), or with several
        splits float32 (splits, tokens, rows), a partial sum each.
    outer
        (blocks, OUTER, OUTER): dense blocks on a diagonal that the outputs are multiplied with, before the bias is added; for one
        split, and a tile of whole blocks.
    per_split
        Blocks of a split.
    OUTER
        Side of the outer blocks, 0 without them.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    token_mask = token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first_block = split * per_split
    for at_block in range(0, tl.minimum(per_split, blocks - first_block)):
        block = first_block + at_block
        words = lane_words(values, row_tile * ROWS, rows, values_stride, block * 32, 4, ROWS, WARPS)
        later_words = lane_words(values, row_tile * ROWS, rows, values_stride, block * 32 + 16, 4, ROWS, WARPS)
        marks = lane_words(places, row_tile * ROWS, rows, places_stride, block * 4, 1, ROWS, WARPS).reshape(ROWS, 4)
        weight = _sixteens(words, later_words, marks, 0, 8, ROWS, DTYPE)
        weight = weight.permute(0, 6, 5, 4, 3, 1, 2).reshape(ROWS, 128)
        column = block * 128 + tl.arange(0, 128)
        mask = (column < features)[:, None] & token_mask[None, :]
        vectors = tl.load(x + token[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
        # As `lanes` has them: number 8 m + 2 t + h of a sixteen is its input 4 t + 2 m + h.
        vectors = vectors.reshape(8, 4, 2, 2, TOKENS).permute(0, 2, 1, 3, 4).reshape(128, TOKENS)
        if WIDE:
            total = tl.dot(weight.to(tl.float32), vectors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(weight, vectors, total)
    if OUTER > 0:
        at = tl.arange(0, ROWS)
        place, across = row_tile * ROWS + at, at[None, :] % OUTER
        same = (at[:, None] // OUTER == at[None, :] // OUTER) & (place < rows)[:, None] & (place < rows)[None, :]
        near = tl.load(outer + place.to(tl.int64)[:, None] * OUTER + across, mask=same, other=0.0)
        if WIDE:
            total = tl.dot(near.to(tl.float32), total.to(DTYPE).to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(near, total.to(DTYPE))
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    store_tile(out + split.to(tl.int64) * split_stride, total, row, row < rows, token, token_mask, out_stride)
