"""Eight-bit integer weights, and eight-bit activations with them."""
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

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8(NamedForm):
    """One byte a value, a scale for each output channel, or for each group of its inputs.

    With ``activations=true`` each input vector is rounded to int8 as well, with a scale of its own found as it comes
    ("dynamic, per token"), and the product runs on integers; `apply` is then linear only up to that rounding.

    Examples
    --------
    >>> Int8().fit(torch.tensor([[1.0, -0.5]])).values.tolist()
    [[127, -64]]
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit integer weights; with activations=true inputs too, rounded token by token"
    # Scales come from the largest value alone, data or none.
    optimal_on_data: ClassVar[bool] = True

    group: int | None = field(default=None, metadata={"help": "inputs that share a scale; none: a whole row"})
    activations: bool = field(default=False, metadata={"help": "round each input vector to int8 as well"})
    symmetric: bool = field(default=True, metadata={"help": "zero is code 0; false: a zero point for each group"})

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise FormError(f"int8: group is {self.group}, not positive; 128 would work")

    @property
    def dense_leaves(self) -> bool:
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(group=16), cls(symmetric=False), cls(activations=True), cls(group=16, activations=True)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(group=16), cls(group=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Quantized:
        return outline_quantized(
            shape, dtype, bits=8, group=self.group, symmetric=self.symmetric, activations=self.activations
        )

    def solve(self, weight: Tensor, stats: Stats | None) -> Quantized:
        return fit_quantized(
            weight, stats, bits=8, group=self.group, symmetric=self.symmetric, activations=self.activations
        )
