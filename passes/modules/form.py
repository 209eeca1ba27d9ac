"""`ModuleForm`: what is asked for of a whole block, and `Fit`, what it comes to."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

if TYPE_CHECKING:
    from recast.passes.forms.column_sparse import ColumnSparse
    from recast.passes.modules.block import Block
    from recast.passes.modules.place import Place

__all__ = ["Fit", "Made", "ModuleForm"]


@dataclass(frozen=True)
class Made:
    """What becomes of one linear of a block.

    Parameters
    ----------
    matrix, bias
        The new ones; a bias of None stays as it is.
    labels
        Of the rows it had, int32; see `recast.passes.modules.flow`. None where all rows stay.
    stats
        Of its inputs as they are now; None where they stay.
    """

    matrix: Tensor
    bias: Tensor | None = None
    labels: Tensor | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Fit:
    """What a form makes of a block. It names linears, not values of a graph, so it outlives the graph.

    Parameters
    ----------
    made
        New matrices by the name of the linear.
    end
        Name of the linear that takes the features; None where queries and keys meet, and for experts.
    kept
        Labels of the features that stay.
    inner
        Features before and after.
    shape
        Of the old matrix that the errors are of.
    stand_in
        What `end` and all that was before it amount to, as a form of the old matrix of `end`; None without an `end`.
    predicted_error, measured_error, weight_error
        Of the block's output (or of scores) on the calibration data, on its sample, and ``|W - W'| / |W|``.
    stand_ins, places
        For experts, `stand_in` of each linear that takes features, and where the matrices of all lie.
    """

    made: Mapping[str, Made]
    end: str | None
    kept: Tensor
    inner: tuple[int, int]
    shape: tuple[int, int]
    stand_in: Operator | None
    predicted_error: float
    measured_error: float | None
    weight_error: float
    stand_ins: Mapping[str, ColumnSparse] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleForm(NamedForm):
    """A form of a block whose linears share an inner width: less of it stays. The result is smaller plain matrices."""

    ratio: float = field(metadata={"help": "share of the inner width that is kept"})
    round_to: int = field(default=1, kw_only=True, metadata={"help": "the width kept is a multiple of this"})

    parts: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise FormError(f"{self.name}: ratio is {self.ratio}, not in (0, 1]; 0.75 would keep three quarters")
        if self.round_to < 1:
            raise FormError(f"{self.name}: round_to is {self.round_to}, not positive; 1, 8 or 64 would work")

    @abc.abstractmethod
    def solve_block(self, block: Block) -> Fit:
        """Fit a block.

        Raises
        ------
        Refused
            The block cannot be made smaller.
        FormError
            Statistics are missing.
        """

    def width(self, whole: int) -> int:
        """Return how many of `whole` features stay: all, or the nearest multiple of `round_to` that is not zero.

        Examples
        --------
        >>> from recast.passes.modules.nystrom import Nystrom
        >>> Nystrom(0.75).width(10), Nystrom(0.75, round_to=8).width(100), Nystrom(0.01).width(10)
        (8, 72, 1)
        """
        if self.ratio == 1:
            return whole
        wanted = max(1, round(self.ratio * whole / self.round_to)) * self.round_to
        return min(wanted, whole)

    # What a form of a single matrix can be asked.

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return []

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def refits(self) -> bool:
        return False

    def problem(self, shape: tuple[int, int]) -> tuple[str, str]:
        return (
            f"is one matrix, and this a form of {self.parts}",
            "it stands alone, and what should follow it in a rule (or the default) of its own",
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> NoReturn:
        self.check(shape)
        raise NotImplementedError

    def solve(self, weight: Tensor, stats: Stats | None) -> NoReturn:
        self.check((weight.shape[0], weight.shape[1]))
        raise NotImplementedError
