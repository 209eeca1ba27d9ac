"""The product of vectors with a weight whose values stand at the bits set in a bitmap, written out in registers.

``y[t, r] = sum_{c : marked(r, c)} value[place(r, c)] x[t, c] + bias[r]``, where a place is the number of marks before it. A lane of
the matrix unit counts the marks up to its two numbers in a word of 32, loads them, and lays zeros over those that are not
marked. No list of columns is stored, nothing is gathered from x: at a density of a half columns of 16 bits would take as
many bytes as the zeros.

This file is imported only where Triton is installed. `recast.kernels.bitmap_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from recast.kernels.epilogue.triton import store_tile

__all__ = ["bitmap_matmul_kernel", "write_out_kernel"]


@triton.jit
def _count(word, WIDE: tl.constexpr):
    """Bits that are set in each word."""
    if WIDE:  # the interpreter knows no function of a device
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        word = word + (word >> 8)
        return (word + (word >> 16)) & 0x3F
    else:
        return libdevice.popc(word)


@triton.jit
def _octet(word, start, values, lane, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Both numbers of each lane in eight columns, and where the values of the next eight begin."""
    here = (word >> lane) & 0x10001
    # Marks up to the left one of both, itself included: the value before is its own, the one after is the right one's.
    until = (((2 << lane) - 1) & 0xFFFF) | (((1 << lane) - 1) << 16)
    at = values + (start + _count(word & until, WIDE))
    first, second = tl.load(at - 1), tl.load(at)
    if DTYPE == tl.float32:
        low, high = tl.where((here & 1) != 0, first, 0.0), tl.where((here & 0x10000) != 0, second, 0.0)
    else:
        both = ((first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)) & (here * 0xFFFF)
        low, high = both.to(tl.int16).to(DTYPE, bitcast=True), (both >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high), start + _count(word, WIDE)


@triton.jit
def _octets(words, mask, start, values, lane, FIRST: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` octets, a two for each halving added behind, and where the next ones begin."""
    if COUNT == 4:
        # The same words for all lanes of a quad, 16 bytes at a time: a lane then has what it needs where it needs it.
        at = words[:, :, :, :, :, None] + FIRST + tl.arange(0, 4)[None, None, None, None, None, :]
        four = tl.load(at, mask=mask[:, :, :, :, :, None], other=0)
        even, odd = tl.split(four.reshape(four.shape[0], 2, four.shape[2], 8, 4, 2, 2))
        word0, word2 = tl.split(even)
        word1, word3 = tl.split(odd)
        found0, start = _octet(word0, start, values, lane, DTYPE, WIDE)
        found1, start = _octet(word1, start, values, lane, DTYPE, WIDE)
        found2, start = _octet(word2, start, values, lane, DTYPE, WIDE)
        found3, start = _octet(word3, start, values, lane, DTYPE, WIDE)
        return tl.join(tl.join(found0, found1), tl.join(found2, found3)), start
    else:
        HALF: tl.constexpr = COUNT // 2
        near, start = _octets(words, mask, start, values, lane, FIRST, HALF, DTYPE, WIDE)
        far, start = _octets(words, mask, start, values, lane, FIRST + HALF, HALF, DTYPE, WIDE)
        return tl.join(near, far), start


@triton.jit
def _weight(values, words, starts, row_tile, step, quads, words_stride, starts_stride, STEP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Numbers of a tile of rows and STEP columns, (ROWS, STEP), as the matrix unit has them."""
    tl.static_assert(STEP == 128)
    REPEATS: tl.constexpr = ROWS // (16 * WARPS)
    # (repeat, half, warp, row, lane): rows r and r + 8 of sixteen are in the same lane.
    within = tl.arange(0, ROWS).reshape(REPEATS, WARPS, 2, 8).permute(0, 2, 1, 3) // 4
    quad = row_tile * (ROWS // 4) + within[:, :, :, :, None] + tl.arange(0, 4)[None, None, None, None, :] * 0
    mask = quad < quads
    lane = ((tl.arange(0, 8) % 4 * 4)[:, None] + tl.arange(0, 4)[None, :])[None, None, None, :, :]
    start = tl.load(starts + quad.to(tl.int64) * starts_stride + step, mask=mask, other=1)
    near = words + quad.to(tl.int64) * words_stride + step * (STEP // 8)
    found, _ = _octets(near, mask, start, values, lane, 0, STEP // 8, DTYPE, WIDE)
    # (repeat, half, warp, row, lane, number, and twos from the finest on) as rows and columns.
    return found.permute(0, 2, 1, 3, 9, 8, 7, 6, 4, 5).reshape(ROWS, STEP)


@triton.jit
def bitmap_matmul_kernel(
    x, values, words, starts, bias, out,
    tokens, rows, features, quads, steps,
    x_stride, words_stride, starts_stride, out_stride, split_stride, per_split,
    STEP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the columns of one split.

    Parameters
    ----------
    x, values, words, starts, out
        (tokens, features); the values between two zeros, 16-bit ones as int16; (quads, octets) and (quads, steps), as `reference`
        has them; (tokens, rows), or with several splits float32 (splits, tokens, rows), a partial sum each.
    bias
        (rows,).
    per_split
        Steps of a split.
    PRECISION
        Of products of float32, as `tl.dot` names it.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_mask, token_mask = row < rows, token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first = split * per_split
    for step in range(first, tl.minimum(first + per_split, steps)):
        weight = _weight(values, words, starts, row_tile, step, quads, words_stride, starts_stride, STEP, ROWS, WARPS, DTYPE, WIDE)  # fmt: skip
        column = step * STEP + tl.arange(0, STEP)
        mask = (column < features)[:, None] & token_mask[None, :]
        vectors = tl.load(x + token[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
        if WIDE:
            total = tl.dot(weight.to(tl.float32), vectors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(weight, vectors, total, input_precision=PRECISION)
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    store_tile(out + split.to(tl.int64) * split_stride, total, row, row_mask, token, token_mask, out_stride)


@triton.jit
def write_out_kernel(
    values, words, starts, out, rows, features, quads, words_stride, starts_stride, out_stride,
    STEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of STEP columns out in the dtype of `out` (rows, features); parameters as above."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row_tile, step = tl.program_id(0), tl.program_id(1)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = step * STEP + tl.arange(0, STEP)
    weight = _weight(values, words, starts, row_tile, step, quads, words_stride, starts_stride, STEP, ROWS, WARPS, DTYPE, WIDE)  # fmt: skip
    there = out + row[:, None] * out_stride + column[None, :]
    tl.store(there, weight, mask=(row < rows)[:, None] & (column < features)[None, :])
