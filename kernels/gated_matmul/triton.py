"""Products of few vectors with the columns that their gates let through, and the score from which on inputs are let through.

``y[t, r] = sum_{j : keep[t, j]} x[t, j] columns[j, r] + bias[r]``. A column that none of the vectors wants is not loaded: with
one vector and half of its inputs kept half of the weight's bytes are read. No list of columns is made, which would take
launches of its own; the loads of a tile are masked column by column, and a masked load moves nothing. Columns are contiguous
(the weight is held transposed), so that one that is wanted is read in whole sectors.

This file is imported only where Triton is installed. `recast.kernels.gated_matmul.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gate_cuts_kernel", "gated_matmul_kernel"]


@triton.jit
def _scores(x, norms, place, mask, WEIGHTED: tl.constexpr):
    """Inputs and their scores, in float32."""
    values = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    scores = tl.abs(values)
    if WEIGHTED:
        scores *= tl.load(norms + place, mask=mask, other=0.0)
    return values, scores


@triton.jit
def gate_cuts_kernel(x, norms, cuts, features, kept, x_stride, WEIGHTED: tl.constexpr, FEATURES: tl.constexpr):
    """Write the `kept`-th largest score of one vector: a selection digit by digit, eight bits at a time from the top.

    Scores are not negative, so that their bits order them. A sort of them all would take longer than the product.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, FEATURES)
    real = at < features
    _, scores = _scores(x + token * x_stride + at, norms, at, real, WEIGHTED)
    bits = scores.to(tl.int32, bitcast=True)
    digits = tl.arange(0, 512)
    found, left = kept * 0, kept
    for level in tl.static_range(4):
        shift: tl.constexpr = 24 - 8 * level
        alike = real
        if level > 0:
            alike = alike & ((bits >> (shift + 8)) == found)
        # Those that differ above are counted where nothing is read.
        counts = tl.histogram(tl.where(alike, (bits >> shift) & 255, 256), 512)
        counts = tl.where(digits < 256, counts, 0)
        reached = tl.cumsum(counts, 0, reverse=True) >= left
        digit = tl.max(tl.where(reached & (digits < 256), digits, 0), 0)
        left -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        found = (found << 8) | digit
    tl.store(cuts + token, found.to(tl.float32, bitcast=True))


@triton.jit
def gated_matmul_kernel(
    x, columns, norms, cuts, bias, out,
    tokens, rows, features, threshold,
    x_stride, columns_stride, split_stride, per_split,
    WEIGHTED: tl.constexpr, BY_COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of up to TOKENS vectors, over the inputs of one split.

    Parameters
    ----------
    x, columns, norms, cuts, bias, out
        (tokens, features); (features, rows); float32 (features,); float32 (tokens,); (rows,); (tokens, rows), or with several
        splits float32 (splits, tokens, rows), a partial sum each.
    threshold
        Score to be exceeded, where inputs are not kept by their number.
    per_split
        Pieces of INPUTS inputs in a split.
    BY_COUNT
        Scores are held against `cuts`, which count themselves.
    """
    row_tile, split = tl.program_id(0), tl.program_id(1)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    token = tl.arange(0, TOKENS)
    token_mask = token < tokens
    total = tl.zeros((TOKENS, INPUTS, ROWS), tl.float32)
    if BY_COUNT:
        least = tl.load(cuts + token, mask=token_mask, other=0.0)
    for piece in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(features, INPUTS))):
        place = piece * INPUTS + tl.arange(0, INPUTS)
        mask = token_mask[:, None] & (place < features)[None, :]
        there = x + token.to(tl.int64)[:, None] * x_stride + place[None, :]
        values, scores = _scores(there, norms, place[None, :], mask, WEIGHTED)
        if BY_COUNT:
            keep = (scores >= least[:, None]) & mask
        else:
            keep = (scores > threshold) & mask
        wanted = tl.max(keep.to(tl.int32), 0) > 0
        weight = tl.load(
            columns + place.to(tl.int64)[:, None] * columns_stride + row[None, :],
            mask=wanted[:, None] & row_mask[None, :],
            other=0.0,
        )
        counted = tl.where(keep, values, 0.0)
        total += counted[:, :, None] * weight.to(tl.float32)[None, :, :]
    sums = tl.sum(total, 1)
    if HAS_BIAS:
        if split == 0:
            sums += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    to = out + split.to(tl.int64) * split_stride + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])
