"""The product of vectors and a weight that both have eight bits, int8 or e4m3, on the matrix units that take such numbers as they are.

``y[t, r] = step[t] (scale[r] sum_k weight[r, k] x[t, k] - zero[t] offset[r]) + bias[r]``. Integers are added up in 32 bits, floats in float32. Hopper's units add products
of e4m3 up with fourteen bits; after each 128 inputs such a sum is added to one in float32.

This file is imported only where Triton is installed. `recast.kernels.eight_bit_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import store_finished

__all__ = ["eight_bit_matmul_kernel"]


@triton.jit
def eight_bit_matmul_kernel(
    x, weight, scale, step, zero, offset, bias, factor, residual, out,
    tokens, rows, features, x_stride, weight_stride, out_stride, split_stride, per_split,
    HAS_STEP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    INTEGERS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, weight, scale, out
        (tokens, features); (rows, features); (rows,); (tokens, rows), or with several splits float32 (splits, tokens, rows), a
        partial sum each.
    step, zero, offset, bias
        (tokens,) and (tokens,), where tokens were rounded by steps, and from a zero, of their own; (rows,) and (rows,).
    factor, residual, ACTIVATION, GATED
        What is done with sums, see `recast.kernels.epilogue.reference.Epilogue`; with several splits nothing.
    per_split
        Steps of a split.
    INTEGERS
        Whether numbers are int8, else e4m3.
    WIDE
        Take floats as their bytes and multiply in float32, for the interpreter, which can neither fill up nor multiply them.
    STEP
        Inputs taken at a time.
    """
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_mask, token_mask = row < rows, token < tokens
    near, far = weight + row[:, None] * weight_stride, x + token[None, :] * x_stride
    total = tl.zeros((ROWS, TOKENS), tl.int32 if INTEGERS else tl.float32)
    NOTHING: tl.constexpr = 0 if INTEGERS or WIDE else 0.0
    first = split * per_split
    for at in range(first, tl.minimum(first + per_split, tl.cdiv(features, STEP))):
        column = at * STEP + tl.arange(0, STEP)
        known = column < features
        numbers = tl.load(near + column[None, :], mask=row_mask[:, None] & known[None, :], other=NOTHING)
        vectors = tl.load(far + column[:, None], mask=known[:, None] & token_mask[None, :], other=NOTHING)
        if INTEGERS:
            total = tl.dot(numbers, vectors, total, out_dtype=tl.int32)
        elif WIDE:
            left = numbers.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            right = vectors.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        else:
            total = tl.dot(numbers, vectors, total, max_num_imprecise_acc=128)
    scaled = total.to(tl.float32) * tl.load(scale + row, mask=row_mask, other=0.0)[:, None]
    if HAS_ZERO:
        if split == 0:
            moved = tl.load(offset + row, mask=row_mask, other=0.0)[:, None]
            scaled -= moved * tl.load(zero + token, mask=token_mask, other=0.0)[None, :]
    if HAS_STEP:
        scaled *= tl.load(step + token, mask=token_mask, other=0.0)[None, :]
    if HAS_BIAS:
        if split == 0:
            scaled += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store_finished(
        out + split.to(tl.int64) * split_stride, scaled, factor, residual, row_tile * ROWS, rows, token, token_mask, out_stride,
        ACTIVATION, GATED, HAS_FACTOR, HAS_RESIDUAL, ROWS, TOKENS,
    )  # fmt: skip
