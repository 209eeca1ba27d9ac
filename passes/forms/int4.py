"""Four-bit integer weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast.passes.forms.form import NamedForm
from recast.passes.forms.integer import Integer

__all__ = ["Int4"]


@dataclass(frozen=True)
class Int4(Integer):
    """Half a byte a value, two packed in each byte, a scale for each group of inputs.

    Notes
    -----
    ``rounding='gptq'``: Frantar et al., GPTQ (2022), with the grid of each group chosen for the least error weighted by the
    data. ``rounding='quantease'``: Behdin et al., QuantEase (2023), begun from GPTQ's result. Without data both are plain
    rounding.

    Examples
    --------
    >>> import torch
    >>> from recast.passes.forms import Stats, relative_error
    >>> Int4().fit(torch.randn(64, 64)).nbytes  # 2048 of codes, 64 x 2 scales
    2560
    >>> weight, x = torch.randn(32, 64), torch.randn(200, 64) @ torch.randn(64, 64)
    >>> stats = Stats.from_inputs(x)
    >>> nearest, gptq = (Int4(rounding=way).fit(weight, stats) for way in ("nearest", "gptq"))
    >>> relative_error(weight, gptq, stats)[1] < 0.8 * relative_error(weight, nearest, stats)[1]
    True
    """

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4-bit integer weights in groups, packed; clipped where that lowers the error"
    bits: ClassVar[int] = 4

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [
            cls(),
            cls(group=16),
            cls(group=8, symmetric=False),
            cls(group=100),
            cls(group=16, clip=False),
            cls(rounding="gptq"),
            cls(group="tensor"),
            cls(group="tensor", symmetric=False, rounding="gptq"),
        ]
