"""What the integer forms below eight bits share: groups, zero points and roundings."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.quantized import Quantized, outline_quantized
from recast.passes.forms.quantized_fit import fit_quantized
from recast.passes.forms.rounding import ROUNDINGS
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["TENSOR", "Integer", "check_group", "check_rounding", "inputs_of_group", "rounds_without_data"]

# Said of a group: all of the matrix shares one scale.
TENSOR = "tensor"


def check_group(name: str, group: int | str | None, works: int) -> None:
    """Raise FormError unless a group is a number of inputs or the whole matrix."""
    if isinstance(group, str):
        if group != TENSOR:
            raise FormError(f"{name}: group is {group!r}; a number of inputs, e.g. {works}, or '{TENSOR}' would work")
    elif group is not None and group < 1:
        raise FormError(f"{name}: group is {group}, not positive; {works} would work")


def inputs_of_group(group: int | str | None) -> int | None:
    """Return how many inputs share a scale, None for all of a row."""
    return None if isinstance(group, str) else group


def check_rounding(name: str, rounding: str, act_order: bool) -> None:
    """Raise FormError unless these two parameters of the form `name` go together."""
    if rounding not in ROUNDINGS:
        known = " or ".join(repr(known) for known in ROUNDINGS)
        raise FormError(f"{name}: rounding is {rounding!r}; {known} would work")
    if act_order and rounding == "nearest":
        raise FormError(f"{name}: act_order speaks of the order in which gptq rounds; add rounding='gptq'")


def rounds_without_data(form: NamedForm, rounding: str) -> str | None:
    """As `Form.without_data`, of a form with a parameter `rounding`."""
    return None if rounding == "nearest" else f"{form} rounds to nearest"


@dataclass(frozen=True)
class Integer(NamedForm):
    """``W[i, j] ≈ (code - zero) * scale`` with codes of a few bits and a scale for each group of a row's inputs.

    A subclass sets `name` and `bits`.
    """

    bits: ClassVar[int]
    # Each row keeps the better of its scales, and of its roundings, with and without the data.
    optimal_on_data: ClassVar[bool] = True

    group: int | str = field(default=32, metadata={"help": "inputs that share a scale; 'tensor': the whole matrix"})
    symmetric: bool = field(default=True, metadata={"help": "the middle code is zero; false: a zero point a group"})
    rounding: str = field(default="nearest", metadata={"help": "'nearest', or with data 'gptq' or 'quantease'"})
    act_order: bool = field(default=False, metadata={"help": "gptq: round inputs of the largest mean square first"})
    clip: bool = field(
        default=True, metadata={"help": "cut a group's largest values off where that errs less; false: never"}
    )

    def __post_init__(self) -> None:
        check_group(self.name, self.group, 32)
        check_rounding(self.name, self.rounding, self.act_order)

    @property
    def without_data(self) -> str | None:
        return rounds_without_data(self, self.rounding)

    @property
    def dense_leaves(self) -> bool:
        return False

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(group=64), cls(group=16), cls(group=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Quantized:
        return outline_quantized(
            shape,
            dtype,
            bits=self.bits,
            group=inputs_of_group(self.group),
            symmetric=self.symmetric,
            per_tensor=self.group == TENSOR,
        )

    def solve(self, weight: Tensor, stats: Stats | None) -> Quantized:
        return fit_quantized(
            weight,
            stats,
            bits=self.bits,
            group=inputs_of_group(self.group),
            symmetric=self.symmetric,
            per_tensor=self.group == TENSOR,
            rounding=self.rounding,
            act_order=self.act_order,
            clip=self.clip,
        )
