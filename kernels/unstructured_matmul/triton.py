"""The product of vectors with a weight of values at any places, which are put into dense tiles in registers.

``y[t, r] = sum_k value[r, k] x[t, k] + bias[r]`` over the inputs k that row r has a value for. Memory brings a bitmap and the values,
the matrix units multiply dense tiles: loaded as sparse, computed as dense (Flash-LLM, Xia et al., 2023), with places in bits as in
SpInfer (Fan et al., 2025).

A lane takes four inputs of a row at a time. It counts the values before its own, loads the next four there are, one instruction each
without an address of its own, for lines of the cache that its neighbours read as well, and moves them to their places by shifts: 36
operations for four weights, however many are zero. At half density an H200 has 6.7 for a weight in the time that memory needs, so
this is bound by operations, at three quarters of what they would leave a dense weight of 16 bits; see docs/kernels.md.

This file is imported only where Triton is installed. `recast.kernels.unstructured_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recast.kernels.epilogue.triton import store_tile
from recast.kernels.quantized_matmul.triton import in_order, row_order

__all__ = ["unstructured_matmul_kernel", "write_out_kernel"]


@triton.jit
def _bits_set(word):
    """How many bits of uint32 are set; compilers know the sum for their machine's instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _one_of_four(words, WHICH: tl.constexpr):
    """One of four words: (..., 4) to (...)."""
    even, odd = tl.split(
        words.reshape(words.shape[0], words.shape[1], words.shape[2], words.shape[3], words.shape[4], 2, 2)
    )
    low, high = tl.split(even) if WHICH % 2 == 0 else tl.split(odd)
    return low if WHICH < 2 else high


@triton.jit
def _four(values, word, start, place, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Inputs 4 t + j, j below 4, of each lane t: (ROWS, lane, 2, 2), the higher bit of j first."""
    first = values + (start + _bits_set(~word & ((1 << place) - 1)))
    # The lane's bits at 4 to 7: masked, they are numbers of bits to shift by.
    turn = (place + 28) & 31
    twice = (word.to(tl.uint64) << 32) | word.to(tl.uint64)
    bits = (twice >> turn.to(tl.uint64)).to(tl.uint32)
    none0, none1, none2, none3 = bits & 16, (bits >> 1) & 16, (bits >> 2) & 16, (bits >> 3) & 16
    if DTYPE == tl.float32:
        later, last = first + (1 - none0 // 16), first + (2 - (none0 + none1) // 16)
        low0 = tl.load(first, mask=none0 == 0, other=0.0)
        high0 = tl.load(later, mask=none1 == 0, other=0.0)
        low1 = tl.load(last, mask=none2 == 0, other=0.0)
        high1 = tl.load(last + (1 - none2 // 16), mask=none3 == 0, other=0.0)
    else:
        # As many as there may be; what is behind the lane's own is not used.
        value0, value1, value2, value3 = _bits(first), _bits(first + 1), _bits(first + 2), _bits(first + 3)
        lower, upper = value0 | (value1 << 16), value2 | (value3 << 16)
        rest = ((upper.to(tl.uint64) << 32) | lower.to(tl.uint64)) >> (32 - none0 - none1).to(tl.uint64)
        low0, high0 = _two(lower, none0, none1, DTYPE)
        low1, high1 = _two(rest.to(tl.uint32), none2, none3, DTYPE)
    found = tl.join(tl.join(low0, high0), tl.join(low1, high1))
    return found.permute(0, 2, 1, 3, 4, 5, 6).reshape(ROWS, 4, 2, 2)


@triton.jit
def _bits(value):
    return tl.load(value).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _two(pair, none0, none1, DTYPE: tl.constexpr):
    """Two numbers of 16 bits: zero for the first one and the next one moved up, zero for the second one, if so many bits say so."""
    pair = ((pair << none0) << none1) >> none1
    return pair.to(tl.uint16).to(DTYPE, bitcast=True), (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def _sixteens(values, words, later_words, starts, place, FIRST: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Numbers of `COUNT` sixteens of inputs: (ROWS, lane, half, pair, and a two for each halving, the finest first)."""
    if COUNT == 1:
        word = _one_of_four(words if FIRST < 4 else later_words, FIRST % 4)
        start = _one_of_four(starts, FIRST // 2)
        start = (start >> 16) if FIRST % 2 == 1 else (start & 0xFFFF)
        return _four(values, word.to(tl.uint32, bitcast=True), start, place, ROWS, DTYPE)
    else:
        HALF: tl.constexpr = COUNT // 2
        first = _sixteens(values, words, later_words, starts, place, FIRST, HALF, ROWS, DTYPE)
        later = _sixteens(values, words, later_words, starts, place, FIRST + HALF, HALF, ROWS, DTYPE)
        return tl.join(first, later)


@triton.jit
def _shared_words(words, at):
    """Four words from where each row has them, the same for all lanes: (repeat, half, warp, row, lane, 4) int32."""
    within = tl.zeros((4, 1), tl.int32) + tl.arange(0, 4)[None, :]
    return tl.load(words + at[:, :, :, :, None, None] + within[None, None, None, None, :, :])


@triton.jit
def _weight(values, words, starts, offsets, first_row, units, block, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """A block of ROWS rows and 128 inputs, in the order of `lanes`: (ROWS, 128)."""
    row = first_row + row_order(ROWS, WARPS)
    row = tl.where(row // 16 < units, row, 0)  # any, where there is none
    at = (row // 2).to(tl.int64) * blocks + block
    first, later = _shared_words(words, at * 8), _shared_words(words, at * 8 + 4)
    begins = _shared_words(starts, at * 4)
    offset = tl.load(offsets + (row // 16).to(tl.int64) * blocks + block)
    here = values + offset.to(tl.int64) * 8
    place = (row % 2 * 16)[:, :, :, :, None] + 4 * tl.arange(0, 4)[None, None, None, None, :]
    found = _sixteens(
        here[:, :, :, :, None],
        first,
        later,
        begins,
        place.to(tl.uint32, bitcast=True),
        0,
        8,
        ROWS,
        values.dtype.element_ty,
    )
    return in_order(found, 8, ROWS)


@triton.jit
def unstructured_matmul_kernel(
    x, values, words, starts, offsets, bias, out,
    tokens, rows, features, units, blocks,
    x_stride, split_stride, per_split,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS outputs and TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, values, bias, out
        (tokens, features); (k,); (rows,); (tokens, rows), or with several splits float32 (splits, tokens, rows), a partial sum each.
    words, starts, offsets
        int32 (8 units, 8 blocks), (8 units, 4 blocks), of two numbers each, and (units, blocks).
    per_split
        Blocks of a split.
    WIDE
        Multiply in float32, for the interpreter, which takes bfloat16 in `tl.dot` for integers.
    """
    row_tile, token_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = (token_tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    token_mask = token < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first_block = split * per_split
    for at_block in range(0, tl.minimum(per_split, blocks - first_block)):
        block = first_block + at_block
        weight = _weight(values, words, starts, offsets, row_tile * ROWS, units, block, blocks, ROWS, WARPS)
        column = block * 128 + tl.arange(0, 128)
        mask = (column < features)[:, None] & token_mask[None, :]
        vectors = tl.load(x + token[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
        # As `lanes` has them: number 8 m + 2 t + h of a sixteen is its input 4 t + 2 m + h.
        vectors = vectors.reshape(8, 4, 2, 2, TOKENS).permute(0, 2, 1, 3, 4).reshape(128, TOKENS)
        if WIDE:
            total = tl.dot(weight.to(tl.float32), vectors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(weight, vectors, total, input_precision=PRECISION)
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    store_tile(out + split.to(tl.int64) * split_stride, total, row, row < rows, token, token_mask, rows)


@triton.jit
def write_out_kernel(
    values, words, starts, offsets, out, rows, features, units, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Write ROWS rows of one block out in the dtype of `values`; parameters as above, but for out (rows, features)."""
    row_tile, block = tl.program_id(0), tl.program_id(1)
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    weight = _weight(values, words, starts, offsets, row_tile * ROWS, units, block, blocks, ROWS, WARPS)
    # Number 8 m + 2 t + h of a sixteen is its input 4 t + 2 m + h.
    weight = weight.reshape(ROWS, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, 128)
    column = block * 128 + tl.arange(0, 128)
    mask = (row < rows)[:, None] & (column < features)[None, :]
    tl.store(out + row[:, None] * features + column[None, :], weight, mask=mask)
