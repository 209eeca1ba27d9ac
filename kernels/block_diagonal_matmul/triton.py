"""The product of vectors with dense blocks on a diagonal, which with one block is a dense matrix.

``y[t, out(b, r)] = sum_k block[b, r, k] (sum_s x[s, t, in(b, k)]) + bias[out(b, r)]``.

Vectors may come in partial sums. Where tokens are few the inputs of a product are split, so that all processors read weights, and
leave a partial sum each. A product that follows takes these sums as they are and adds them up while it loads them: no launch of its
own, no vector in memory that is read once.

Features may stand in another order than that of the blocks. A transposition between two products, as Monarch matrices have it, is
where the first one stores, not a pass of its own; so is a permutation that was learned.

This file is imported only where Triton is installed. `recast.kernels.block_diagonal_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import finished

__all__ = ["block_matmul_kernel"]


@triton.jit
def _places(feature, mask, index, rows, columns, width, ORDER: tl.constexpr, RUN: tl.constexpr):
    """Where features of the blocks stand: as they are, by an index, or with the rows and columns of a grid exchanged."""
    if ORDER == "index":
        place = tl.load(index + feature, mask=mask, other=0)
    elif ORDER == "grid":
        cell, within = feature // width, feature % width
        row, column = cell // columns, cell % columns
        place = (column * rows + row) * width + within
    else:
        place = feature
    if RUN > 1:  # whole runs stay together, which the compiler cannot know
        place = tl.multiple_of(tl.max_contiguous(place, RUN), RUN)
    return place


@triton.jit
def block_matmul_kernel(
    x, weight, bias, factor, residual, gather, scatter, out,
    tokens, rows, features, height, width, columns, last_columns, tiles,
    in_rows, in_columns, in_width, out_rows, out_columns, out_width,
    x_stride, x_split_stride, block_stride, row_stride, column_stride, out_stride, split_stride, per_split,
    SUMMED: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs of a block and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, weight, bias, out
        (SUMMED, tokens, features); (blocks, height, columns); (rows,) as the result has them; (tokens, rows), or with several splits
        float32 (splits, tokens, rows), a partial sum each.
    rows, features
        Outputs and inputs that there are: the last block may go beyond them.
    width, columns, last_columns
        Inputs of a block; its columns, of which those beyond the inputs are multiplied by zero; columns of the last block.
    gather, in_rows, in_columns, in_width, IN
        Where the inputs of the blocks stand in x: IN is "as they are", "index" (int32, `gather`) or "grid".
    scatter, out_rows, out_columns, out_width, OUT
        The same of outputs.
    IN_RUN, OUT_RUN
        So many features, from a multiple of that on, stand together in x and in the result.
    factor, residual, ACTIVATION
        What is done with sums, see `recast.kernels.epilogue.reference.Epilogue`; with several splits nothing.
    tiles, per_split
        Tiles of a block; steps of a split.
    SUMMED
        Partial sums that x consists of.
    PRECISION
        Of products of float32, as `tl.dot` names it.
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
    far = x + token[:, None] * x_stride
    held = tl.where(block == tl.num_programs(0) // tiles - 1, last_columns, columns)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first = split * per_split
    for at in range(first, tl.minimum(first + per_split, tl.cdiv(columns, STEP))):
        column = at * STEP + tl.arange(0, STEP)
        # What fills rows up is loaded with the rest, so that ragged blocks come in 16 bytes at a time as well.
        mask = row_mask[:, None] & (column < held)[None, :]
        numbers = tl.load(near + column.to(tl.int64)[None, :] * column_stride, mask=mask, other=0.0)
        known = (column < width) & (column < features - block * width)
        place = _places(block * width + column, known, gather, in_rows, in_columns, in_width, IN, IN_RUN)[None, :]
        mask = token_mask[:, None] & known[None, :]
        vectors = tl.load(far + place, mask=mask, other=0.0)
        for one in tl.static_range(1, SUMMED):
            vectors += tl.load(far + one * x_split_stride + place, mask=mask, other=0.0)
        vectors = vectors.to(DTYPE).trans()
        if WIDE:
            total = tl.dot(numbers.to(tl.float32), vectors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(numbers, vectors, total, input_precision=PRECISION)
    place = _places(row, row_mask, scatter, out_rows, out_columns, out_width, OUT, OUT_RUN)
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + place, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    # Neighbouring threads take neighbouring outputs of a vector, also where the compiler cannot see that they are.
    at, mask = token[:, None] * out_stride + place[None, :], token_mask[:, None] & row_mask[None, :]
    found = finished(total.trans(), factor, residual, at, mask, ACTIVATION, HAS_FACTOR, HAS_RESIDUAL)
    tl.store(out + split.to(tl.int64) * split_stride + at, found.to(out.dtype.element_ty), mask=mask)
