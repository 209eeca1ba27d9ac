"""Calls `rounded_tokens.c`: products of a few vectors, rounded to bytes, with packed integer weights on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from recast.kernels.native import Source
from recast.kernels.quantized_matmul.blocks import BLOCK

__all__ = ["reference", "rounded_tokens", "unavailable"]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "rounded", "step", "sums", "codes", "scale", "zero", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "blocks", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "zeros", "threads", "unused")),
    ]


_SOURCE = Source(__file__, {"rounded_tokens": ([ctypes.POINTER(_Product)], None)})
unavailable = _SOURCE.unavailable  # why it does not run here, or None


def rounded_tokens(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int) -> Tensor:
    """Multiply vectors, rounded to 255 steps in each group, by a packed weight.

    Parameters
    ----------
    x
        (tokens, n), float32.
    codes
        uint8 (m, 4 * bits * blocks), of `blocks.to_blocks`.
    scale, zero
        float32 (m, groups), contiguous. Without `zero`, codes count from the middle, ``2^(bits - 1)``.
    bits
        2, 3, 4 or 8.

    Returns
    -------
    float32 (tokens, m).
    """
    (tokens, features), (rows, groups) = x.shape, scale.shape
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    blocks = codes.shape[1] // (4 * bits)
    x = torch.nn.functional.pad(x, (0, blocks * BLOCK - features)).contiguous()
    rounded = torch.empty_like(x, dtype=torch.int8)
    step = x.new_empty((tokens, groups))
    sums = torch.empty_like(step, dtype=torch.int32)
    middle = scale.new_full((1,), 2.0 ** (bits - 1)) if zero is None else zero
    held = (x, rounded, step, sums, codes, scale, middle, out)
    _SOURCE.rounded_tokens(
        _Product(
            *(tensor.data_ptr() for tensor in held),
            *(tokens, rows, blocks, groups, bits, zero is not None, torch.get_num_threads(), 0),
        )
    )
    return out


def reference(x: Tensor, group: int) -> Tensor:
    """What the kernel multiplies in place of x (tokens, n): multiples of a step for each group, max |x| / 127 (0: one group).

    Examples
    --------
    >>> reference(torch.tensor([[1.27, 0.004, -0.006]]), 0)
    tensor([[ 1.2700,  0.0000, -0.0100]])
    """
    n = x.shape[1]
    width = group or n
    parts = torch.nn.functional.pad(x, (0, -n % width)).reshape(len(x), -1, width)
    step = parts.abs().amax(-1, keepdim=True) / 127
    return (torch.round(parts / torch.where(step > 0, step, 1)) * step).reshape(len(x), -1)[:, :n]
