"""Products of few vectors, many of whose inputs are zero, with the columns of a weight; and the score from which on inputs count.

``y[t, r] = sum_{j : x[t, j] != 0} x[t, j] columns[j, r] + bias[r]``. A column whose input is zero in all vectors is not loaded: with
one vector and half of its inputs kept half of the weight's bytes are read. No list of columns is made, which would take
launches of its own; the loads of a piece are masked column by column, and a masked load moves nothing. Columns are contiguous
(the weight is held transposed), so that one that is wanted is read in whole sectors.

A block is one warp: a lane holds eight outputs in 16 bytes of each column, so that sums over columns are its own, without exchange.

This file is imported only where Triton is installed. `recast.kernels.gated_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_matmul_kernel", "gate_cuts_kernel"]


@triton.jit
def gate_cuts_kernel(x, norms, cuts, features, kept, x_stride, WEIGHTED: tl.constexpr, FEATURES: tl.constexpr):
    """Write the `kept`-th largest score of one vector: a selection digit by digit, eight bits at a time from the top.

    Scores are not negative, so that their bits order them. A sort of them all would take longer than the product.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, FEATURES)
    real = at < features
    scores = tl.abs(tl.load(x + token * x_stride + at, mask=real, other=0.0).to(tl.float32))
    if WEIGHTED:
        scores *= tl.load(norms + at, mask=real, other=0.0)
    bits = scores.to(tl.int32, bitcast=True)
    digits = tl.arange(0, 512)
    found, left = kept * 0, kept
    for level in tl.static_range(4):
        alike = real
        if level > 0:
            alike = alike & ((bits >> (32 - 8 * level)) == found)
        # Those that differ above are counted where nothing is read.
        counts = tl.histogram(tl.where(alike, (bits >> (24 - 8 * level)) & 255, 256), 512)
        counts = tl.where(digits < 256, counts, 0)
        reached = tl.cumsum(counts, 0, reverse=True) >= left
        digit = tl.max(tl.where(reached & (digits < 256), digits, 0), 0)
        left -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        found = (found << 8) | digit
    tl.store(cuts + token, found.to(tl.float32, bitcast=True))


@triton.jit
def columns_matmul_kernel(
    x, columns, bias, out,
    tokens, rows, features,
    x_stride, columns_stride, split_stride, per_split,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of up to TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, columns, bias, out
        (tokens, features); (features, rows); (rows,); (tokens, rows), or with several splits float32 (splits, tokens, rows), a
        partial sum each.
    per_split
        Pieces of INPUTS inputs in a split.
    """
    row_tile, split = tl.program_id(0), tl.program_id(1)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for piece in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(features, INPUTS))):
        place = piece * INPUTS + tl.arange(0, INPUTS)
        mask = place < features
        wanted = place < 0
        for t in tl.static_range(TOKENS):
            # (Past the last vector the last one again: nothing more is wanted, and nothing of it is stored.)
            values = tl.load(x + tl.minimum(t, tokens - 1) * x_stride + place, mask=mask, other=0.0).to(tl.float32)
            wanted = wanted | (values != 0.0)
        there = columns + place.to(tl.int64)[:, None] * columns_stride + row[None, :]
        weight = tl.load(there, mask=wanted[:, None] & row_mask[None, :], other=0.0).to(tl.float32)
        for t in tl.static_range(TOKENS):
            values = tl.load(x + tl.minimum(t, tokens - 1) * x_stride + place, mask=mask, other=0.0).to(tl.float32)
            one = tl.sum(values[:, None] * weight, 0)
            if TOKENS == 1:
                total += one[None, :]
            else:
                total = tl.where(token[:, None] == t, total + one[None, :], total)
    if HAS_BIAS:
        if split == 0:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    to = out + split.to(tl.int64) * split_stride + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & row_mask[None, :])
