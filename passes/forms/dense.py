"""The weight as it is."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Dense
from recast.passes.forms.stats import Stats

__all__ = ["DenseForm"]


@dataclass(frozen=True)
class DenseForm(NamedForm):
    """An ordinary matrix: m n values."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "the weight as it is"
    optimal_on_data: ClassVar[bool] = True

    @property
    def refits(self) -> bool:
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Dense:
        return Dense(torch.empty(shape, dtype=dtype, device="meta"))

    def solve(self, weight: Tensor, stats: Stats | None) -> Dense:
        return Dense(weight)
