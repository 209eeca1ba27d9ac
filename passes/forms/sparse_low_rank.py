"""Sparse plus low rank."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.alternating import fit_sum
from recast.passes.forms.form import NamedForm, Scalar
from recast.passes.forms.low_rank import LowRank
from recast.passes.forms.operator import Operator
from recast.passes.forms.pruning import check_method
from recast.passes.forms.stats import Stats
from recast.passes.forms.unstructured import Unstructured, check_storage

__all__ = ["SparseLowRank"]


@dataclass(frozen=True)
class SparseLowRank(NamedForm):
    """``W' = S + B A``: a few values anywhere and a product of two thin matrices, fitted in turns.

    S takes the values of ``W - B A`` that weigh most on the data, ``B A`` is the best of its rank for ``W - S``, until
    the error stops falling. Short for ``unstructured(density, method) + low_rank(...)``; ``sparse24 + low_rank(64)`` is
    fitted in the same way.

    Notes
    -----
    Han et al., SLTrain (2024) train this form from scratch, with places chosen at random; their density is the default.

    Examples
    --------
    >>> weight = torch.ones(32, 32)
    >>> weight[3, 5] = 9.0
    >>> operator = SparseLowRank(rank=1, density=0.04).fit(weight)
    >>> operator.nbytes  # 32 values and 1024 bits, 32 + 32 values
    512
    """

    name: ClassVar[str] = "sparse_low_rank"
    summary: ClassVar[str] = "a few values anywhere plus a product of two thin matrices, fitted in turns"

    rank: int | None = field(default=None, metadata={"help": "inner size of the low-rank part"})
    ratio: float | None = field(default=None, metadata={"help": "or its share of parameters kept, as low_rank's"})
    density: float = field(default=0.03, metadata={"help": "share of the values that the sparse part keeps"})
    method: str | None = field(
        default=None,
        metadata={"help": "of the sparse part: 'magnitude', 'wanda', 'nowag' or 'sparsegpt'; as unstructured's"},
    )
    storage: str = field(
        default="bitmap", metadata={"help": "of its places: 'bitmap', or 'tiled', smaller below a density of 1/16"}
    )

    def __post_init__(self) -> None:
        check_method("sparse_low_rank", self.method)
        check_storage("sparse_low_rank", self.storage)
        self.terms()

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        first = LowRank.positional(values[:1])
        return [*first, "density", "method", "storage"][: len(values)]

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        rank = max(1, min(shape) // 8)
        return [cls(rank=rank, density=0.1), cls(rank=rank, density=0.05, storage="tiled")]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        small = min(shape)
        return [cls(rank=rank, density=0.1) for rank in sorted({1, max(1, small // 4), max(1, small // 2)})]

    @property
    def fixed_point(self) -> bool:
        return False  # an alternating fit is no projection

    def terms(self) -> tuple[Unstructured, LowRank]:
        """Return the two forms that are added."""
        return Unstructured(self.density, self.method, storage=self.storage), LowRank(rank=self.rank, ratio=self.ratio)

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        return next((found for term in self.terms() if (found := term.problem(shape)) is not None), None)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        sparse, low = self.terms()
        thin = low.outline(shape, dtype)
        return None if thin is None else Sum((sparse.outline(shape, dtype), thin))

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        return fit_sum(self.terms(), weight, stats)
