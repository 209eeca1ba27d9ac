"""A basis shared by several layers: the SVD of their matrices one above the other."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.form import NamedForm, Scalar
from recast.passes.forms.linear_algebra import behind, best_left, leading_subspace, times
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.shared import SharedForm, pooled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["SharedBasis"]


@dataclass(frozen=True)
class SharedBasis(SharedForm):
    """W_l ≈ C_l B with one B (k, n) for all matrices of a group and a C_l (m, k) for each.

    B is found under the sum of the Gram matrices of the group; each C_l is then solved for anew under its own. ``ratio``
    keeps that share of the group's parameters: ``k (n + g m) = ratio g m n``.

    Notes
    -----
    Wang et al., Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression (2024). The paper takes
    the coefficients as they come out of the decomposition; solving for them again is ours, and never worse on the data.

    Examples
    --------
    >>> weights = [torch.ones(8, 8), 2 * torch.ones(8, 8)]
    >>> first, second = SharedBasis(1, group=2).fit_together(weights, [None, None])
    >>> torch.testing.assert_close(second.to_dense(), weights[1])
    >>> first.right.weight is second.right.weight
    True
    """

    name: ClassVar[str] = "shared_basis"
    summary: ClassVar[str] = "low rank with the inner factor in common: one basis for several layers"

    rank: int | None = field(default=None, metadata={"help": "the inner size k"})
    ratio: float | None = field(default=None, metadata={"help": "share of the group's parameters kept"})
    group: int = field(default=2, kw_only=True, metadata={"help": "matrices in a group; 0: all of them"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rank is None) == (self.ratio is None):
            raise FormError(f"{self.name}: either a rank or a ratio is needed; rank=64 or ratio=0.5 would work")
        if self.rank is not None and self.rank < 1:
            raise FormError(f"{self.name}: rank is {self.rank}, not positive; 1 or more would work")
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise FormError(f"{self.name}: ratio is {self.ratio}, not positive; 0.5 would keep half of the parameters")

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        # shared_basis(64) is a rank, shared_basis(0.5) a ratio.
        return ["ratio" if type(values[0]) is float else "rank"] if values else []

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(rank=max(1, min(shape) // 4)), cls(rank=min(shape), group=0)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        small = min(shape)
        return [cls(rank=rank) for rank in sorted({1, max(1, small // 3), small})]

    def rank_for(self, shape: tuple[int, int], members: int) -> int:
        """Return the inner size for a group of so many weights (m, n)."""
        m, n = shape
        if self.ratio is None:
            assert self.rank is not None
            return self.rank
        return int(self.ratio * members * m * n / (n + members * m) * (1 + 1e-12))

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        # A group of several has room for a larger rank, up to n; of one, no more than this is of use.
        rank, largest = self.rank_for(shape, 1), shape[1]
        if rank > largest:
            return f"takes {largest} inputs, rank {rank} is asked for", f"{largest} or less would work"
        if rank < 1:
            return (
                f"keeps no rank at ratio {self.ratio}",
                f"{sum(shape) / (shape[0] * shape[1]):.4f} or more would work",
            )
        return None

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        rank = self.rank_for(shape, 1)
        left = torch.empty(shape[0], rank, dtype=dtype, device="meta")
        return Product(Dense(left), Dense(torch.empty(rank, shape[1], dtype=dtype, device="meta")))

    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        m, n = weights[0].shape
        rank = min(self.rank_for((m, n), len(weights)), n)
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        stacked = torch.cat([weight.to(wide) for weight in weights])
        together = pooled(stats)
        gram = None if together is None or together.gram is None else together.gram.to(stacked.device)
        left = leading_subspace(stacked, gram, rank=min(rank, len(stacked)))
        found = times(stacked.T, left).T
        del stacked
        if len(found) < rank:  # more directions than rows: the rest is zero
            found = torch.nn.functional.pad(found, (0, 0, 0, rank - len(found)))
            left = torch.nn.functional.pad(left, (0, rank - left.shape[1]))
        size = found.norm(dim=1).clamp_min(torch.finfo(found.dtype).tiny).sqrt()
        basis = Dense((found / size.unsqueeze(1)).to(weights[0].dtype).contiguous())
        made: list[Operator] = []
        for part, weight, known in zip((left * size).split(m), weights, stats, strict=True):
            coefficients = part
            if known is not None and known.gram is not None:
                _, seen = behind(basis, known)
                coefficients = best_left(weight, basis, known, seen)
            made.append(Product(Dense(coefficients.to(weight.dtype).contiguous()), basis))
        return made
