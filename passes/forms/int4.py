"""Four-bit integer weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.quantized import Quantized, fit_quantized, outline_quantized
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Int4"]


@dataclass(frozen=True)
class Int4(NamedForm):
    """Half a byte a value, two packed in each byte, a scale for each group of inputs.

    Examples
    --------
    >>> Int4().fit(torch.randn(64, 64)).nbytes  # 2048 of codes, 64 x 2 scales
    2560
    """

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "4-bit integer weights in groups, packed; clipped where that lowers the error"
    # Each row keeps the better of its scales with and without the data.
    optimal_on_data: ClassVar[bool] = True

    group: int = field(default=32, metadata={"help": "inputs that share a scale"})
    symmetric: bool = field(default=True, metadata={"help": "zero is code 8; false: a zero point for each group"})

    def __post_init__(self) -> None:
        if self.group < 1:
            raise FormError(f"int4: group is {self.group}, not positive; 32 would work")

    @property
    def dense_leaves(self) -> bool:
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(group=16), cls(group=8, symmetric=False), cls(group=100)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(group=64), cls(group=16), cls(group=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Quantized:
        return outline_quantized(shape, dtype, bits=4, group=self.group, symmetric=self.symmetric)

    def solve(self, weight: Tensor, stats: Stats | None) -> Quantized:
        return fit_quantized(weight, stats, bits=4, group=self.group, symmetric=self.symmetric)
