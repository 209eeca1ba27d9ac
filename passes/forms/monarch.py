"""Monarch: two block-diagonal matrices with a transposition between them."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.block_diagonal import even_split
from recast.passes.forms.block_products import fit_slices, outline_slices
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Monarch"]


@dataclass(frozen=True)
class Monarch(NamedForm):
    """W ≈ P L Q R: L and R of b blocks each, P and Q transpositions of the features between them.

    As a tensor, ``W[(l, j), (k, i)] = Σ_t L[j, l, (k, t)] R[k, (j, t), i]``: each of the b² slices over (l, i) has rank
    r, b r (m + n) values together. With b = √n and rank 1 this is the Monarch matrix of the paper; without a rank given,
    r = min(m, n) / b², which is its layer (for a square weight 2/b of the parameters). Rectangular weights need
    divisible sides only.

    Notes
    -----
    Dao et al., Monarch: Expressive Structured Matrices for Efficient and Accurate Training (2022). The projection,
    one truncated SVD a slice, is optimal without data; with data, see `recast.passes.forms.block_products`.

    Examples
    --------
    >>> operator = Monarch(blocks=4).fit(torch.randn(64, 64))
    >>> operator.nbytes / (64 * 64 * 4)
    0.5
    """

    name: ClassVar[str] = "monarch"
    summary: ClassVar[str] = "two block-diagonal matrices with a transposition between: each slice of low rank"

    blocks: int = field(default=4, metadata={"help": "blocks of each factor; must divide both sizes"})
    rank: int | None = field(default=None, metadata={"help": "rank of each slice; min(m, n) / blocks² if not given"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise FormError(f"{self.name}: blocks is {self.blocks}, not positive; 4 would work")
        if self.rank is not None and self.rank < 1:
            raise FormError(f"{self.name}: rank is {self.rank}, not positive; 1 or more would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        common = math.gcd(*shape)
        blocks = max(b for b in range(1, common + 1) if common % b == 0 and b * b <= max(*shape, 1))
        return [cls(blocks)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        blocks = cls.examples(shape)[0].blocks  # type: ignore[attr-defined]
        full = min(shape) // blocks
        return [cls(blocks, rank) for rank in sorted({1, max(1, full // 2), full})]

    def rank_for(self, shape: tuple[int, int]) -> int:
        """Return the rank of each slice for a weight (m, n)."""
        return self.rank or max(1, min(shape) // self.blocks**2)

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        uneven = even_split(shape, self.blocks)
        largest = min(shape) // self.blocks
        if uneven is not None or self.rank_for(shape) <= largest:
            return uneven
        return f"has slices of rank at most {largest}, asked {self.rank}", f"{largest} or less would work"

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        return outline_slices(shape, dtype, self.blocks, self.blocks, self.rank_for(shape))

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        rank = self.rank_for((weight.shape[0], weight.shape[1]))
        return fit_slices(weight, stats, self.blocks, self.blocks, rank)
