"""Calls `few_tokens.c`: products of a few vectors with packed weights on a CPU, and rows of such a weight written out."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recast.kernels.native import Source
from recast.kernels.quantized_matmul.blocks import BLOCK

__all__ = ["few_tokens", "unavailable", "write_out"]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "sums", "codes", "scale", "zero", "table", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "blocks", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "zeros", "looked_up", "threads")),
    ]


_SOURCE = Source(
    __file__,
    {
        "few_tokens": ([ctypes.POINTER(_Product)], None),
        "write_out": ([ctypes.POINTER(_Product), ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int], None),
    },
)
unavailable = _SOURCE.unavailable  # why it does not run here, or None


def few_tokens(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, *, bits: int
) -> Tensor:
    """Multiply vectors by a packed weight, which is decoded once for each four of them.

    Parameters
    ----------
    x
        (tokens, n), float32.
    codes
        uint8 (m, 4 * bits * blocks), of `blocks.to_blocks`.
    scale, zero
        float32 (m, groups), contiguous. Without `zero`, codes count from the middle, ``2^(bits - 1)``.
    table
        float32 (2^bits,): codes name its entries, and have no zero. None: they are the numbers.
    bits
        2, 3, 4 or 8.

    Returns
    -------
    float32 (tokens, m).
    """
    tokens, features = x.shape
    out = x.new_empty((tokens, codes.shape[0]))
    if not out.numel():
        return out
    product, kept = _product(codes, scale, zero, table, bits)
    width = product.blocks * BLOCK
    x = torch.nn.functional.pad(x, (0, width - features)) if features < width else x.contiguous()
    sums = x.new_empty((tokens, scale.shape[1]))
    product.x, product.sums, product.out, product.tokens = x.data_ptr(), sums.data_ptr(), out.data_ptr(), tokens
    _SOURCE.few_tokens(product)
    del kept
    return out


def write_out(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    features: int,
    rows: range,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Write rows of such a weight out: (len(rows), features), in float32 or bfloat16."""
    product, kept = _product(codes, scale, zero, table, bits)
    out = scale.new_empty((len(rows), features), dtype=dtype)
    _SOURCE.write_out(product, out.data_ptr(), rows.start, rows.stop, features, dtype == torch.bfloat16)
    del kept
    return out


def _product(
    codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int
) -> tuple[_Product, tuple[Tensor, ...]]:
    """The weight's half of a call, and what must live as long."""
    middle = scale.new_full((1,), 2.0 ** (bits - 1)) if zero is None else zero
    entries = middle if table is None else table
    product = _Product(codes=codes.data_ptr(), scale=scale.data_ptr(), zero=middle.data_ptr(), table=entries.data_ptr())
    product.rows, product.groups = codes.shape[0], scale.shape[1]
    product.blocks, product.bits = codes.shape[1] // (4 * bits), bits
    product.zeros, product.looked_up, product.threads = zero is not None, table is not None, torch.get_num_threads()
    return product, (middle, entries)
