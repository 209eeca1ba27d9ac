"""Rounding of inputs to small floating point formats, in plain torch: what hardware with such products rounds to.

Every function traces: the number of tokens may be symbolic. All of it runs in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FloatGrid", "float_tokens", "rounded_product"]


@dataclass(frozen=True)
class FloatGrid:
    """Numbers of a sign, a few bits of mantissa and an exponent: ``± (1 + f/2^M) 2^e``, with subnormal numbers and zero.

    Attributes
    ----------
    mantissa
        Bits M that are stored of it.
    lowest
        The least exponent e; numbers below 2^e are multiples of 2^(e - M).
    largest
        The largest number.
    """

    mantissa: int
    lowest: int
    largest: float

    def nearest(self, numbers: Tensor) -> Tensor:
        """Round numbers of any shape to the grid, halves to the even mantissa, and what is beyond the largest to it.

        Examples
        --------
        >>> e2m1 = FloatGrid(mantissa=1, lowest=0, largest=6.0)
        >>> e2m1.nearest(torch.tensor([0.25, 0.75, 2.5, 3.5, 5.0, -9.0])).tolist()
        [0.0, 1.0, 2.0, 4.0, 4.0, -6.0]
        """
        # A logarithm may round across a whole number; next to a power of two the steps of both its sides hold the nearest.
        exponent = torch.log2(numbers.abs()).floor().clamp_min(self.lowest)
        step = torch.exp2(exponent - self.mantissa)
        return (torch.round(numbers / step) * step).clamp(-self.largest, self.largest)


def float_tokens(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """Round vectors of (..., n) to a float format, ``x = values * scale``, the largest of each to the format's largest.

    Parameters
    ----------
    x
        (..., n), floating.
    grid
        The format.

    Returns
    -------
    values
        (..., n), numbers of the format, in float32 (float64 for float64).
    scale
        (..., 1), of the same dtype; 0 for a vector of zeros, whose values are zeros.

    Examples
    --------
    >>> values, scale = float_tokens(torch.tensor([[12.0, 1.2, 0.4]]), FloatGrid(1, 0, 6.0))
    >>> values.tolist(), scale.tolist()
    ([[6.0, 0.5, 0.0]], [[2.0]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / grid.largest
    return grid.nearest(wide / torch.where(scale == 0, 1, scale)), scale


def rounded_product(x: Tensor, grid: FloatGrid, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply vectors (..., n) after rounding them to a float format; what adds up does so in float32 or better.

    Parameters
    ----------
    x, grid
        As in `float_tokens`.
    product
        Of vectors (..., n) with the weight, (..., m); linear.

    Returns
    -------
    (..., m) in x's dtype.
    """
    values, scale = float_tokens(x, grid)
    return (product(values) * scale).to(x.dtype)
