"""What rounding lost, given back by a low-rank term."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.form import NamedForm, Scalar
from recast.passes.forms.low_rank import LowRank
from recast.passes.forms.operator import Operator
from recast.passes.forms.scaled import OverBase
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Corrected", "Lorc"]


@dataclass(frozen=True)
class Corrected(OverBase):
    """A form of the weight plus a low-rank term; `base` and `rank` are parameters."""

    rank: int = field(default=8, metadata={"help": "inner size of the low-rank term"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise FormError(f"{self.name}: rank is {self.rank}, not positive; 8 would work")

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        # lorc(8, 'int3') and lorc('int3', 8).
        first = ["base", "rank"] if values and isinstance(values[0], str) else ["rank", "base"]
        rest = [p.name for p in cls.parameters() if p.name not in first]
        return [*first, *rest][: len(values)]

    @property
    def dense_leaves(self) -> bool:
        return True

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        small = min(shape)
        return [cls(base="int4(group=16)", rank=rank) for rank in sorted({1, max(1, small // 4), max(1, small // 2)})]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        largest = min(shape)  # bytes are those of the base besides: no rank of it saves any by itself
        return (
            None
            if self.rank <= largest
            else (f"has rank at most {largest}, asked {self.rank}", f"{largest} or less would work")
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        first, second = self.inner().outline(shape, dtype), LowRank(rank=self.rank).outline(shape, dtype)
        return None if first is None or second is None else Sum((first, second))

    def correction(self, weight: Tensor, rest: Tensor, stats: Stats | None) -> Operator:
        """Return the low-rank term for what is left, in the weight's dtype."""
        return LowRank(rank=self.rank).solve(rest, stats).to(weight.dtype)


@dataclass(frozen=True)
class Lorc(Corrected):
    """``W ≈ Q + B A`` with Q the base form of W and ``B A`` the best of its rank for ``W - Q``, on the data where there is any.

    One rounding and one correction; ``int4 + low_rank(8)`` goes on from there, in turns. Factors in eight bits, as
    published, are ``lorc(8) | int8``.

    Notes
    -----
    Yao et al., ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation
    (2023). With data the error is weighted by it (truncated SVD of ``(W - Q) S`` with ``G = S Sᵀ``), which theirs is not.

    Examples
    --------
    >>> weight = torch.randn(64, 64)
    >>> plain, corrected = Lorc(rank=1).inner().fit(weight), Lorc(rank=16).fit(weight)
    >>> bool((corrected.to_dense() - weight).norm() < 0.8 * (plain.to_dense() - weight).norm())
    True
    """

    name: ClassVar[str] = "lorc"
    summary: ClassVar[str] = "quantized, plus a low-rank term for what rounding lost"
    # The base is fitted with the data or without, and corrected; either may come out better.
    optimal_on_data: ClassVar[bool] = False

    base: str = field(default="int4", metadata={"help": "the form that is corrected, as text"})

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(rank=1, base="int3(group=20)")]

    def solve(self, weight: Tensor, stats: Stats | None) -> Sum:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        first = self.inner().fit(weight, stats)
        rest = wide - first.to_dense().to(wide.dtype)
        return Sum((first, self.correction(weight, rest, stats)))
