"""Calls `rounded_rows.c`: vectors rounded to bytes, their products with int8 weights, and what follows those, on a CPU with VNNI."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from recast.kernels.epilogue.reference import ACTIVATIONS
from recast.kernels.native import Source

__all__ = ["OUTPUTS", "held_features", "multiply", "round_rows", "to_lanes", "unavailable"]

OUTPUTS = 64  # of a weight lie together
_NUMBERS = {"": 0, **{name: 1 + i for i, name in enumerate(ACTIVATIONS)}}
_POINTERS = (
    "x",
    "codes",
    "grid",
    "weights",
    "scale",
    "sums",
    "bias",
    "factor",
    "residual",
    "y",
    "next_codes",
    "next_grid",
)
_SIZES = ("tokens", "features", "held", "outputs", "next_held", "x_step")
_FLAGS = ("activation", "half", "given", "next_given", "threads", "unused")


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _FLAGS),
    ]


_SOURCE = Source(__file__, {"rounded_rows": ([ctypes.POINTER(_Product)], ctypes.c_int)})
unavailable = _SOURCE.unavailable  # why it does not run here, or None


def held_features(features: int) -> int:
    """How many codes a vector of so many features takes: they are filled up to fours.

    Examples
    --------
    >>> held_features(63), held_features(64)
    (64, 64)
    """
    return -(-features // 4) * 4


def to_lanes(values: Tensor) -> Tensor:
    """Lay an int8 weight (m, n) out as the kernel reads it: (⌈m/64⌉, ⌈n/4⌉, 64, 4).

    Examples
    --------
    >>> to_lanes(torch.ones(100, 30, dtype=torch.int8)).shape
    torch.Size([2, 8, 64, 4])
    """
    m, n = values.shape
    filled = torch.nn.functional.pad(values, (0, held_features(n) - n, 0, -m % OUTPUTS))
    return filled.reshape(-1, OUTPUTS, held_features(n) // 4, 4).transpose(1, 2).contiguous()


def _call(**given: Tensor | int | bool | None) -> None:
    held = {name: value.data_ptr() if isinstance(value, Tensor) else value or 0 for name, value in given.items()}
    if _SOURCE.rounded_rows(_Product(threads=torch.get_num_threads(), **held)):
        raise MemoryError("rounded rows: no memory for rows that wait to be rounded")


def round_rows(x: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round vectors to unsigned bytes, ``x = (code - zero) * step``.

    Parameters
    ----------
    x
        (..., n), float32 or bfloat16.
    grid
        float32 (2,): step and zero (0 to 255); what is beyond the range is cut off. None: those of the range of each vector,
        zero included.

    Returns
    -------
    codes, grid
        uint8 (..., `held_features`), and float32 (..., 2), or what was given.
    """
    features = x.shape[-1]
    codes = x.new_empty((*x.shape[:-1], held_features(features)), dtype=torch.uint8)
    flat = x.reshape(-1, features)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    found = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32) if grid is None else grid
    if codes.numel():
        _call(
            x=flat, codes=codes, grid=found, tokens=len(flat), features=features, held=codes.shape[-1], x_step=flat.stride(0),
            half=x.dtype == torch.bfloat16, given=grid is not None,
        )  # fmt: skip
    return codes, found


def multiply(
    codes: Tensor,
    grid: Tensor,
    weights: Tensor,
    scale: Tensor,
    sums: Tensor,
    outputs: int,
    *,
    bias: Tensor | None = None,
    activation: str = "",
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    rounded: bool = False,
    next_grid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``f(step scale (codes weightᵀ - zero sums) + bias) * factor + residual``.

    Parameters
    ----------
    codes, grid
        Of `round_rows`.
    weights
        int8, of `to_lanes`.
    scale, sums
        Of each output, filled up to a multiple of 64: float32, and int32, of the codes of the weight.
    outputs
        How many of them there are.
    bias
        float32, filled up as well.
    activation
        One of `ACTIVATIONS`, or none.
    factor, residual
        (..., outputs) in `dtype`.
    dtype
        float32 or bfloat16, of the result.
    rounded, next_grid
        The result is rounded as `round_rows` would.

    Returns
    -------
    (..., outputs) and None; or codes and grid of that.
    """
    lead = codes.shape[:-1]
    tokens = math.prod(lead)
    y, found, held = None, None, held_features(outputs)
    if rounded:
        made = codes.new_empty((*lead, held))
        found = grid.new_empty((*lead, 2)) if next_grid is None else next_grid
    else:
        made = y = codes.new_empty((*lead, outputs), dtype=dtype)
    beside = {name: None if t is None else t.contiguous() for name, t in (("factor", factor), ("residual", residual))}
    if tokens and outputs:
        _call(
            codes=codes, grid=grid, weights=weights, scale=scale, sums=sums, bias=bias, **beside, y=y,
            next_codes=made if rounded else None, next_grid=found, tokens=tokens, held=codes.shape[-1], outputs=outputs,
            next_held=held, activation=_NUMBERS[activation], half=dtype == torch.bfloat16, given=grid.dim() == 1,
            next_given=next_grid is not None,
        )  # fmt: skip
    return made, found
