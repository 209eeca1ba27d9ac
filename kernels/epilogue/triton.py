"""What a product's kernel does with its sums before it stores them; one helper for all kernels, and a kernel for sums in memory.

Where inputs of a product are split, its sums are complete only when they are added up: `finish_kernel` does so, and what is to be
done with them in the same pass. With one "split" it serves products of a library.

This file is imported only where Triton is installed. `recast.kernels.epilogue.launch` calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish_kernel", "finished", "store_finished", "store_tile"]


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """One of `reference.ACTIVATIONS` of float32."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)  # what is no number stays so
    elif ACTIVATION == "relu2":
        z = tl.where(z < 0, 0.0, z)
        return z * z
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2 u
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "quick_gelu":
        return z * tl.sigmoid(1.702 * z)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        return 2.0 * tl.sigmoid(2.0 * z) - 1.0
    else:
        tl.static_assert(ACTIVATION == "")
        return z


@triton.jit
def finished(total, factor, residual, at, mask, ACTIVATION: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr):  # fmt: skip
    """Finish sums of any shape; `at` is where each of them stands in `factor` and `residual`."""
    total = _activated(total, ACTIVATION)
    if HAS_FACTOR:
        total *= tl.load(factor + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def store_tile(out, total, row, row_mask, token, token_mask, stride):
    """Write a tile (ROWS, TOKENS) to ``out[token, row]``."""
    there = out + token[None, :] * stride + row[:, None]
    tl.store(there, total.to(out.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@triton.jit
def store_finished(
    out, total, factor, residual, first_row, rows, token, token_mask, stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Finish a tile (ROWS, TOKENS) of a weight's rows from the first on, and write it to ``out[token, row]``."""
    if GATED:
        # Eights of rows in turns: a lane of the matrix unit has both numbers.
        gate, up = tl.split(total.reshape(ROWS // 16, 2, 8, TOKENS).permute(0, 2, 3, 1))
        gate, up = gate.reshape(ROWS // 2, TOKENS), up.reshape(ROWS // 2, TOKENS)
        row = (first_row // 2 + tl.arange(0, ROWS // 2)).to(tl.int64)
        row_mask = row < rows // 2
        at = token[None, :] * stride + row[:, None]
        mask = row_mask[:, None] & token_mask[None, :]
        found = finished(_activated(gate, ACTIVATION) * up, factor, residual, at, mask, "", HAS_FACTOR, HAS_RESIDUAL)
    else:
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = row < rows
        at = token[None, :] * stride + row[:, None]
        mask = row_mask[:, None] & token_mask[None, :]
        found = finished(total, factor, residual, at, mask, ACTIVATION, HAS_FACTOR, HAS_RESIDUAL)
    store_tile(out, found, row, row_mask, token, token_mask, stride)


@triton.jit
def _added_up(partial, place, mask, count, splits):
    total = tl.load(partial + place, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, splits):
        place += count
        total += tl.load(partial + place, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _linear(total, row, token, mask, step, zero, offset, bias, HAS_STEP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Undo the rounding of vectors, and add a bias."""
    if HAS_ZERO:
        total -= tl.load(zero + token, mask=mask, other=0.0) * tl.load(offset + row, mask=mask, other=0.0)
    if HAS_STEP:
        total *= tl.load(step + token, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def finish_kernel(
    partial, step, zero, offset, bias, factor, residual, out, count, splits, columns,
    HAS_STEP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up (splits, tokens, rows) and finish sums into (tokens, columns), all contiguous; `count` is tokens times columns."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    token, column = at // columns, at % columns
    if GATED:
        row = column // 8 * 16 + column % 8
        place = (at - column) * 2 + row
        place = tl.multiple_of(tl.max_contiguous(place, 8), 8)  # columns are eights, which stay together
        gate, up = (
            _added_up(partial, place, mask, 2 * count, splits),
            _added_up(partial, place + 8, mask, 2 * count, splits),
        )
        gate = _linear(gate, row, token, mask, step, zero, offset, bias, HAS_STEP, HAS_ZERO, HAS_BIAS)
        up = _linear(up, row + 8, token, mask, step, zero, offset, bias, HAS_STEP, HAS_ZERO, HAS_BIAS)
        total = finished(_activated(gate, ACTIVATION) * up, factor, residual, at, mask, "", HAS_FACTOR, HAS_RESIDUAL)
    else:
        total = _added_up(partial, at, mask, count, splits)
        total = _linear(total, column, token, mask, step, zero, offset, bias, HAS_STEP, HAS_ZERO, HAS_BIAS)
        total = finished(total, factor, residual, at, mask, ACTIVATION, HAS_FACTOR, HAS_RESIDUAL)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
