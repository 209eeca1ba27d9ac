"""The meaning of a product of eight-bit numbers, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import integer_matmul

__all__ = ["ROUNDED", "Rounded", "eight_bit_matmul", "unrounded"]


class Rounded(NamedTuple):
    """How vectors were rounded: ``x = step (codes - zero)``.

    Attributes
    ----------
    step, zero
        (tokens,) float32, or None for 1 and 0.
    offset
        (m,) float32, sums of a weight's codes times their scale; needed with `zero`.
    """

    step: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None


ROUNDED = Rounded()


def unrounded(sums: Tensor, rounded: Rounded) -> Tensor:
    """Return products of vectors from scaled sums of their codes, (tokens, m).

    Examples
    --------
    >>> unrounded(torch.tensor([[5.0]]), Rounded(*map(torch.tensor, ([0.5], [3.0], [1.0])))).tolist()
    [[1.0]]
    """
    if rounded.zero is not None and rounded.offset is not None:
        sums = sums - rounded.zero[:, None] * rounded.offset
    return sums if rounded.step is None else sums * rounded.step[:, None]


def eight_bit_matmul(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply vectors by a weight of the same eight-bit format and scale each output.

    Parameters
    ----------
    codes
        (tokens, n), int8 or float8_e4m3fn.
    weight
        (m, n), of the same dtype.
    scale
        (m,), floating.

    Returns
    -------
    (tokens, m) float32 (float64 with such scales), ``scale[r] sum_k codes[t, k] weight[r, k]``; integers are added up exactly.

    Examples
    --------
    >>> codes, weight = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, -4]], dtype=torch.int8)
    >>> eight_bit_matmul(codes, weight, torch.tensor([0.5])).tolist()
    [[-2.5]]
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    if codes.dtype == torch.int8:
        return integer_matmul(codes, weight).to(wide) * scale.to(wide)
    return torch.nn.functional.linear(codes.to(wide), weight.to(wide)) * scale.to(wide)
