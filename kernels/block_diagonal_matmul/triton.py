"""The product of vectors with dense blocks on a diagonal, which with one block is a dense matrix; vectors may come in partial sums.

``y[t, b p + r] = sum_k block[b, r, k] (sum_s x[s, t, b q + k]) + bias[b p + r]``. Where tokens are few the inputs of a product are
split, so that all processors read weights, and leave a partial sum each. A product that follows takes these sums as they are and
adds them up while it loads them: no launch of its own, no vector in memory that is read once.

This file is imported only where Triton is installed. `recast.kernels.block_diagonal_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.quantized_matmul.triton import store_tile

__all__ = ["block_matmul_kernel"]


@triton.jit
def block_matmul_kernel(
    x, weight, bias, out,
    tokens, rows, features, height, width, tiles,
    x_stride, x_split_stride, block_stride, row_stride, column_stride, out_stride, split_stride, per_split,
    SUMMED: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs of a block and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, weight, bias, out
        (SUMMED, tokens, features); (blocks, height, width); (rows,); (tokens, rows), or with several splits float32
        (splits, tokens, rows), a partial sum each.
    rows, features
        Outputs and inputs that there are: the last block may go beyond them.
    tiles, per_split
        Tiles of a block; steps of a split.
    SUMMED
        Partial sums that x consists of.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    STEP
        Inputs taken at a time.
    """
    DTYPE: tl.constexpr = weight.dtype.element_ty
    tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tile // tiles
    within = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    row = block * height + within
    row_mask = (within < height) & (row < rows)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    token_mask = token < tokens
    near = weight + block.to(tl.int64) * block_stride + within.to(tl.int64)[:, None] * row_stride
    far = x + token[None, :] * x_stride + block.to(tl.int64) * width
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first = split * per_split
    for at in range(first, tl.minimum(first + per_split, tl.cdiv(width, STEP))):
        column = at * STEP + tl.arange(0, STEP)
        known = (column < width) & (column < features - block * width)
        numbers = tl.load(near + column.to(tl.int64)[None, :] * column_stride, mask=row_mask[:, None] & known[None, :], other=0.0)  # fmt: skip
        mask = known[:, None] & token_mask[None, :]
        vectors = tl.load(far + column[:, None], mask=mask, other=0.0)
        for one in tl.static_range(1, SUMMED):
            vectors += tl.load(far + one * x_split_stride + column[:, None], mask=mask, other=0.0)
        vectors = vectors.to(DTYPE)
        if WIDE:
            total = tl.dot(numbers.to(tl.float32), vectors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(numbers, vectors, total, input_precision="ieee")
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store_tile(
        out + split.to(tl.int64) * split_stride, total, row.to(tl.int64), row_mask, token, token_mask, out_stride
    )
