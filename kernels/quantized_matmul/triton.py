"""The product of 16-bit activations with codes in lane order, decoded in registers on their way to the matrix units.

``y[t, r] = sum_g scale[g, r] (sum_{k in g} code[r, k] x[t, k] - zero[g, r] sum_{k in g} x[t, k])``, and if they are given
``+ sum_j left[r, j] inner[t, j] + bias[r]``.

The weight is the left operand of the product, so that decoded numbers stay in registers, and `lanes` has put the codes where
the matrix unit wants them. Or-ed onto a power of two a code is a floating point number, of which two are made at once; sums
of a group are scaled, not weights. So a weight takes about one operation, where a GPU has three in the time that memory needs.

This file is imported only where Triton is installed. `recast.kernels.quantized_matmul.launch` chooses tiles and calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import store_finished

__all__ = [
    "decoded",
    "dequantizing_matmul_kernel",
    "in_order",
    "lane_words",
    "one_of_words",
    "row_order",
    "write_out_kernel",
]


@triton.jit
def row_order(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Rows of a tile, (ROWS,): those of each warp as the matrix unit has them, rows r and r + 8 in the same lane.

    A load of (repeats, 2, warps, 8, lanes, words) then has every word where it is multiplied.
    """
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    return tl.arange(0, ROWS).reshape(REPEATS, WARPS, 2, 8).permute(0, 2, 1, 3)


@triton.jit
def lane_words(values, first_row, rows, stride, begin, COUNT: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Words of a block, ``COUNT`` for each of four lanes: (ROWS, 4, COUNT) int32."""
    row = first_row + row_order(ROWS, WARPS)[:, :, :, :, None, None]
    within = tl.arange(0, 4)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    at = values + row.to(tl.int64) * stride + (begin + within)[None, None, None, None, :, :]
    found = tl.load(at, mask=row < rows, other=0)
    return found.permute(0, 2, 1, 3, 4, 5).reshape(ROWS, 4, COUNT)


@triton.jit
def one_of_words(words, WHICH: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """One of the words of each lane: (rows, 4)."""
    if COUNT == 4:
        even, odd = tl.split(words.reshape(ROWS, 4, 2, 2))
        low, high = tl.split(even) if WHICH % 2 == 0 else tl.split(odd)
        return low if WHICH < 2 else high
    else:
        low, high = tl.split(words)
        return low if WHICH == 0 else high


@triton.jit
def _pair(words, high_words, PAIR: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Codes of two neighbouring inputs of each lane in the halves of a word: (rows, 4) int32."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    EACH: tl.constexpr = 16 // WIDTH
    FIELD: tl.constexpr = (2**WIDTH - 1) * 0x00010001
    found = one_of_words(words, PAIR // EACH, 4, ROWS)
    found = (found >> (PAIR % EACH * WIDTH)) & FIELD
    if BITS == 3:
        above = one_of_words(high_words, PAIR // 16, 2, ROWS)
        found = found | (((above >> (PAIR % 16)) & 0x00010001) << 2)
    return found


@triton.jit
def decoded(pair, table, BITS: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of both codes, up to the offset of `offset_of`: two tensors in `DTYPE`."""
    if KIND == "integer" and BITS < 8 and DTYPE != tl.float32:
        # The bits of 128 in bfloat16 or 1024 in float16: the code stands in the last places.
        whole = pair | (0x43004300 if DTYPE == tl.bfloat16 else 0x64006400)
        return whole.to(tl.int16).to(DTYPE, bitcast=True), (whole >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        low, high = pair & 0xFFFF, (pair >> 16) & 0xFFFF
        if KIND == "table":
            return tl.load(table + low).to(DTYPE), tl.load(table + high).to(DTYPE)
        elif KIND == "pairs":  # one look-up for both: their bits in the halves of a word
            whole = tl.load(table + ((pair | (pair >> (16 - BITS))) & (4**BITS - 1)))
            return whole.to(tl.int16).to(DTYPE, bitcast=True), (whole >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        elif KIND == "float":  # codes are the bits of floating point numbers of eight bits
            low8, high8 = (
                low.to(tl.uint8).to(tl.float8e4nv, bitcast=True),
                high.to(tl.uint8).to(tl.float8e4nv, bitcast=True),
            )
            return low8.to(DTYPE), high8.to(DTYPE)
        else:
            # Or-ed onto 2^23 in float32: conversions of integers run at a quarter of the rate of everything else.
            low, high = (
                (low | 0x4B000000).to(tl.float32, bitcast=True),
                (high | 0x4B000000).to(tl.float32, bitcast=True),
            )
            MIDDLE: tl.constexpr = 8388608.0 + 2 ** (BITS - 1)
            return (low - MIDDLE).to(DTYPE), (high - MIDDLE).to(DTYPE)


@triton.jit
def _pieces(words, high_words, table, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` sixteens of inputs: (ROWS, lane, half, pair, and a two for each halving, the finest first)."""
    if COUNT == 1:
        low0, high0 = decoded(_pair(words, high_words, 2 * FIRST, BITS, ROWS), table, BITS, KIND, DTYPE)
        low1, high1 = decoded(_pair(words, high_words, 2 * FIRST + 1, BITS, ROWS), table, BITS, KIND, DTYPE)
        return tl.join(tl.join(low0, high0), tl.join(low1, high1))
    else:
        HALF: tl.constexpr = COUNT // 2
        first = _pieces(words, high_words, table, FIRST, HALF, BITS, KIND, ROWS, DTYPE)
        return tl.join(first, _pieces(words, high_words, table, FIRST + HALF, HALF, BITS, KIND, ROWS, DTYPE))


@triton.jit
def in_order(found, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Numbers of `COUNT` sixteens, (ROWS, lane, half, pair, twos), as (ROWS, 16 COUNT)."""
    if COUNT == 1:
        found = found.permute(0, 3, 1, 2)
    elif COUNT == 2:
        found = found.permute(0, 4, 3, 1, 2)
    elif COUNT == 4:
        found = found.permute(0, 5, 4, 3, 1, 2)
    elif COUNT == 8:
        found = found.permute(0, 6, 5, 4, 3, 1, 2)
    else:
        tl.static_assert(COUNT == 16)
        found = found.permute(0, 7, 6, 5, 4, 3, 1, 2)
    return found.reshape(ROWS, 16 * COUNT)


@triton.jit
def _weight(words, high_words, table, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` sixteens of inputs in their order: (ROWS, 16 COUNT)."""
    return in_order(_pieces(words, high_words, table, FIRST, COUNT, BITS, KIND, ROWS, DTYPE), COUNT, ROWS)


@triton.jit
def dequantizing_matmul_kernel(
    x, sums, values, high_values, scale, middle, table, left, inner, bias, factor, residual, out,
    tokens, rows, features, groups, blocks, rank,
    x_stride, sums_stride, values_stride, high_stride, scale_stride, left_stride, inner_stride, out_stride, split_stride,
    per_split,
    BITS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MIDDLE: tl.constexpr, MIDDLE: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, values, high_values, out
        (tokens, features); (rows, words) and for three bits (rows, half as many), in lane order; (tokens, rows), or with
        several splits float32 (splits, tokens, rows), a partial sum each.
    scale, middle, table
        (groups, rows) each, what a decoded number is multiplied with and what is taken from it before; (2^BITS,), or of pairs
        (4^BITS,) int32.
    sums
        float32 (steps, tokens): sums of x over inputs that share a scale, STEP times 16 of them.
    left, inner, bias
        (rows, rank), (tokens, rank): their product is added; (rows,).
    factor, residual, ACTIVATION, GATED
        What is done with sums, see `recast.kernels.epilogue.reference.Epilogue`; with several splits nothing.
    per_split
        Blocks of a split.
    BLOCK, STEP, GROUP
        Inputs of a block of `lanes`; sixteens of inputs after which sums are scaled; inputs of a group, 0 for all.
    KIND, MIDDLE
        "integer", "table", "pairs" or "float"; what is taken where `middle` is not given.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    PRECISION
        Of products of float32, see `tiles.precision_of`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_mask, token_mask = row < rows, token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    DOTS: tl.constexpr = BLOCK // 16
    first_block = split * per_split
    for at_block in range(0, tl.minimum(per_split, blocks - first_block)):
        block = first_block + at_block
        words = lane_words(values, row_tile * ROWS, rows, values_stride, block * 16, 4, ROWS, WARPS)
        high_words = words
        if BITS == 3:
            high_words = lane_words(high_values, row_tile * ROWS, rows, high_stride, block * 8, 2, ROWS, WARPS)
        for step in tl.static_range(DOTS // STEP):
            weight = _weight(words, high_words, table, step * STEP, STEP, BITS, KIND, ROWS, DTYPE)
            column = block * BLOCK + step * STEP * 16 + tl.arange(0, STEP * 16)
            mask = (column < features)[:, None] & token_mask[None, :]
            vectors = tl.load(x + token[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
            if WIDE:
                part = tl.dot(weight.to(tl.float32), vectors.to(tl.float32), input_precision="ieee")
            else:
                part = tl.dot(weight, vectors, input_precision=PRECISION)
            at = block * (DOTS // STEP) + step
            where = row
            if GROUP > 0:  # the last block may go beyond the last group
                where += tl.minimum((at * STEP * 16) // GROUP, groups - 1) * scale_stride
            if HAS_MIDDLE or MIDDLE != 0:
                taken = tl.load(sums + at.to(tl.int64) * sums_stride + token, mask=token_mask, other=0.0)[None, :]
                if HAS_MIDDLE:
                    part -= tl.load(middle + where, mask=row_mask, other=0.0).to(tl.float32)[:, None] * taken
                else:
                    part -= MIDDLE * taken
            if HAS_SCALE:
                part *= tl.load(scale + where, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            total += part
    if RANK > 0:
        if split == 0:
            for first in range(0, rank, RANK):
                at = first + tl.arange(0, RANK)
                known = at < rank
                near = tl.load(
                    left + row[:, None] * left_stride + at[None, :], mask=row_mask[:, None] & known[None, :], other=0.0
                )
                far = tl.load(
                    inner + token[None, :] * inner_stride + at[:, None],
                    mask=known[:, None] & token_mask[None, :],
                    other=0.0,
                )
                if WIDE:
                    total = tl.dot(near.to(tl.float32), far.to(tl.float32), total, input_precision="ieee")
                else:
                    total = tl.dot(near, far, total, input_precision=PRECISION)
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store_finished(
        out + split.to(tl.int64) * split_stride, total, factor, residual, row_tile * ROWS, rows, token, token_mask, out_stride,
        ACTIVATION, GATED, HAS_FACTOR, HAS_RESIDUAL, ROWS, TOKENS,
    )  # fmt: skip


@triton.jit
def write_out_kernel(
    values, high_values, scale, middle, table, out,
    rows, features, groups, values_stride, high_stride, scale_stride, out_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_MIDDLE: tl.constexpr, MIDDLE: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write one block of ROWS rows out in the dtype of `out` (rows, features); parameters as above."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row_tile, block = tl.program_id(0), tl.program_id(1)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = row < rows
    words = lane_words(values, row_tile * ROWS, rows, values_stride, block * 16, 4, ROWS, WARPS)
    high_words = words
    if BITS == 3:
        high_words = lane_words(high_values, row_tile * ROWS, rows, high_stride, block * 8, 2, ROWS, WARPS)
    for step in tl.static_range(BLOCK // 16 // STEP):
        weight = _weight(words, high_words, table, step * STEP, STEP, BITS, KIND, ROWS, DTYPE).to(tl.float32)
        column = block * BLOCK + step * STEP * 16 + tl.arange(0, STEP * 16)
        where = row
        if GROUP > 0:
            at = block * (BLOCK // 16 // STEP) + step
            where += tl.minimum((at * STEP * 16) // GROUP, groups - 1) * scale_stride
        if HAS_MIDDLE:
            weight -= tl.load(middle + where, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        else:
            weight -= MIDDLE
        if HAS_SCALE:
            weight *= tl.load(scale + where, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        there = out + row[:, None] * out_stride + column[None, :]
        tl.store(there, weight.to(DTYPE), mask=row_mask[:, None] & (column < features)[None, :])
