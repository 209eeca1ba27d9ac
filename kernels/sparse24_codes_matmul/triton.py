"""The product of activations with codes of a 2:4 weight in lane order, written out and decoded in registers.

``y[t, r] = sum_g scale[g, r] sum_{i in g} number[r, i] x[t, place[r, i]] + bias[r]``. Writing out takes 2.5 operations for four
inputs of four bits, since it handles all groups of a word at once; decoding is that of a weight without zeros.

This file is imported only where Triton is installed. `recast.kernels.sparse24_codes_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import store_tile
from recast.kernels.quantized_matmul.triton import decoded, in_order, lane_words, one_of_words

__all__ = ["sparse24_codes_matmul_kernel"]


@triton.jit
def _pieces(words, kept_marks, alike_marks, table, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` sixteens of inputs: (ROWS, lane, half, pair, and a two for each halving, the finest first)."""
    EACH: tl.constexpr = 16 // BITS
    if COUNT == 1:
        # The same for all sixteens of a word: the compiler computes it once.
        WORD: tl.constexpr = FIRST // EACH
        FULL: tl.constexpr = 2**BITS - 1
        PLACES: tl.constexpr = 0x11111111 if BITS == 4 else 0x01010101
        word = one_of_words(words, WORD, 4, ROWS)
        kept = ((kept_marks >> WORD) & PLACES) * FULL
        ALIKE: tl.constexpr = WORD if BITS == 4 else WORD + 4
        alike = ((alike_marks >> ALIKE) & (PLACES & 0xFFFF)) * (FULL * 0x10001)
        exchanged = (word << 16) | ((word >> 16) & 0xFFFF)
        lower = word & kept
        upper = (word ^ ((word ^ exchanged) & alike)) & (kept ^ ~alike)
        if KIND == "integer":  # the code of zero is the middle one; tables begin with their zero
            MIDDLE: tl.constexpr = PLACES * 2 ** (BITS - 1) - 2**32
            lower, upper = lower ^ MIDDLE, upper ^ MIDDLE
        SHIFT: tl.constexpr = FIRST % EACH * BITS
        FIELD: tl.constexpr = FULL * 0x10001
        low0, high0 = decoded((lower >> SHIFT) & FIELD, table, BITS, KIND, DTYPE)
        low1, high1 = decoded((upper >> SHIFT) & FIELD, table, BITS, KIND, DTYPE)
        return tl.join(tl.join(low0, high0), tl.join(low1, high1))
    else:
        HALF: tl.constexpr = COUNT // 2
        first = _pieces(words, kept_marks, alike_marks, table, FIRST, HALF, BITS, KIND, ROWS, DTYPE)
        return tl.join(first, _pieces(words, kept_marks, alike_marks, table, FIRST + HALF, HALF, BITS, KIND, ROWS, DTYPE))  # fmt: skip


@triton.jit
def sparse24_codes_matmul_kernel(
    x, sums, values, places, scale, table, bias, out,
    tokens, rows, features, groups, blocks,
    x_stride, sums_stride, values_stride, places_stride, scale_stride, out_stride, split_stride, per_split,
    BITS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, values, places, out
        (tokens, features); (rows, words) each, as `lanes` has them; (tokens, rows), or with several splits float32
        (splits, tokens, rows), a partial sum each.
    scale, table, bias
        (groups, rows); (2^BITS,), zero first, or of pairs (4^BITS,) int32; (rows,).
    sums
        float32 (steps, tokens): sums of x over inputs that share a scale, STEP times 16 of them.
    per_split
        Blocks of a split.
    STEP, GROUP
        Sixteens of inputs after which sums are scaled; inputs of a group, 0 for all.
    KIND, MIDDLE
        "integer", "table" or "pairs"; what decoding adds to every number.
    PRECISION
        Of products of float32, as `tl.dot` names it.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    BLOCK: tl.constexpr = 1024 // BITS
    STEPS: tl.constexpr = BLOCK // 16 // STEP
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_mask, token_mask = row < rows, token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first_block = split * per_split
    for at_block in range(0, tl.minimum(per_split, blocks - first_block)):
        block = first_block + at_block
        words = lane_words(values, row_tile * ROWS, rows, values_stride, block * 16, 4, ROWS, WARPS)
        if BITS == 4:
            marks = lane_words(places, row_tile * ROWS, rows, places_stride, block * 8, 2, ROWS, WARPS)
            kept_marks, alike_marks = tl.split(marks)
        else:
            marks = lane_words(places, row_tile * ROWS, rows, places_stride, block * 4, 1, ROWS, WARPS)
            kept_marks = marks.reshape(ROWS, 4)
            alike_marks = kept_marks
        for step in tl.static_range(STEPS):
            weight = in_order(_pieces(words, kept_marks, alike_marks, table, step * STEP, STEP, BITS, KIND, ROWS, DTYPE), STEP, ROWS)  # fmt: skip
            column = block * BLOCK + step * STEP * 16 + tl.arange(0, STEP * 16)
            mask = (column < features)[:, None] & token_mask[None, :]
            vectors = tl.load(x + token[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
            # Number 8 m + 2 t + h of a sixteen is its input 4 t + 2 m + h.
            vectors = vectors.reshape(STEP, 4, 2, 2, TOKENS).permute(0, 2, 1, 3, 4).reshape(STEP * 16, TOKENS)
            if WIDE:
                part = tl.dot(weight.to(tl.float32), vectors.to(tl.float32), input_precision="ieee")
            else:
                part = tl.dot(weight, vectors, input_precision=PRECISION)
            at = block * STEPS + step
            if MIDDLE != 0:
                part -= MIDDLE * tl.load(sums + at.to(tl.int64) * sums_stride + token, mask=token_mask, other=0.0)[None, :]  # fmt: skip
            if HAS_SCALE:
                where = row
                if GROUP > 0:  # the last block may go beyond the last group
                    where += tl.minimum((at * STEP * 16) // GROUP, groups - 1) * scale_stride
                part *= tl.load(scale + where, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            total += part
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store_tile(out + split.to(tl.int64) * split_stride, total, row, row_mask, token, token_mask, out_stride)
