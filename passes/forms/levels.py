"""What the forms with fixed levels share: a table that the form knows, and a scale for each group of inputs."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.floats import FloatGrid
from recast.passes.forms.codebook import fit_table, outline_table
from recast.passes.forms.form import NamedForm
from recast.passes.forms.integer import check_rounding
from recast.passes.forms.operator import Operator
from recast.passes.forms.rounded_inputs import RoundedInputs
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["SEARCHED", "FloatLevels", "Levels", "float_levels"]

# Shares of the largest value of a group that are tried as the largest of a format, as published (arXiv 2310.16836).
SEARCHED = tuple(0.01 + (1.2 - 0.01) * i / 99 for i in range(100))


@dataclass(frozen=True)
class Levels(NamedForm):
    """``W[i, j] ≈ table[code] * scale`` with a table that is given; a subclass sets `name` and `table`."""

    group: int | None = field(default=None, metadata={"help": "inputs that share a scale; none: a whole row"})
    double: bool = field(default=False, metadata={"help": "scales in 8 bits too, in blocks of 256"})
    rounding: str = field(default="nearest", metadata={"help": "'nearest', or with data 'gptq' or 'quantease'"})
    act_order: bool = field(default=False, metadata={"help": "gptq: round inputs of the largest mean square first"})

    # Without gptq or a search the data says nothing; with them each row keeps the better rounding. Coded scales share
    # blocks with others', which a row's own choice does not foresee.
    @property
    def optimal_on_data(self) -> bool:  # type: ignore[override]  # decided by the parameters
        return not (self.double and len(self.tops()) > 1)

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise FormError(f"{self.name}: group is {self.group}, not positive; 64 would work")
        check_rounding(self.name, self.rounding, self.act_order)

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def fixed_point(self) -> bool:
        # The mean that coded scales are counted from moves; a searched scale need not be met again.
        return not self.double and len(self.tops()) == 1

    @abc.abstractmethod
    def table(self) -> Tensor:
        """Return the levels, (2^bits,) float64, the largest absolute value being 1."""

    def tops(self) -> Sequence[float]:
        """Return the shares of a group's largest value that are tried as its scale."""
        return (1.0,)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        bits = int(math.log2(len(self.table())))
        return outline_table(shape, dtype, bits=bits, group=self.group, double=self.double)

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        table = self.table()
        return fit_table(
            weight,
            stats,
            table,
            bits=int(math.log2(len(table))),
            group=self.group,
            double=self.double,
            rounding=self.rounding,
            act_order=self.act_order,
            tops=self.tops(),
        )


@dataclass(frozen=True)
class FloatLevels(Levels):
    """`Levels` that are those of a float format, to which inputs may be rounded too; a subclass also says the `grid`."""

    activations: bool = field(
        default=False, kw_only=True, metadata={"help": "round each input vector to the format as well"}
    )

    @abc.abstractmethod
    def grid(self) -> FloatGrid:
        """Return the format; what it can hold is the table times the largest."""

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        held = super().outline(shape, dtype)
        return RoundedInputs(held, self.grid()) if self.activations else held

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        held = super().solve(weight, stats)
        return RoundedInputs(held, self.grid()) if self.activations else held


def float_levels(exponent: int, mantissa: int) -> Tensor:
    """Return what a sign, `exponent` and `mantissa` bits stand for, in the order of the bits, the largest value made 1.

    There are subnormal numbers and no codes for infinity and NaN; zero comes twice.

    Examples
    --------
    >>> (6 * float_levels(2, 1)).tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    field_, part = torch.meshgrid(
        torch.arange(2**exponent, dtype=torch.float64), torch.arange(2**mantissa, dtype=torch.float64), indexing="ij"
    )
    share = part / 2**mantissa
    magnitude = torch.where(field_ == 0, share * 2, (1 + share) * 2**field_).reshape(-1)
    magnitude = magnitude / magnitude[-1]
    return torch.cat([magnitude, -magnitude])
