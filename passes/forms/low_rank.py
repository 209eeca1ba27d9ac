"""Low rank: the truncated SVD, of the weight or of the weight as the data sees it."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.form import NamedForm, Scalar
from recast.passes.forms.linear_algebra import leading_subspace, times
from recast.passes.forms.operator import Dense
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, nearest

__all__ = ["LowRank", "factors"]

SOLVERS = ("auto", "exact", "randomized")


@dataclass(frozen=True)
class LowRank(NamedForm):
    """W ≈ B A with B (m, r) and A (r, n), optimal in ``‖(W - B A) X‖``; one of three parameters sets the rank r.

    Notes
    -----
    Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression (2024), in
    its equivalent form as a projection on the principal directions of the output.

    Examples
    --------
    >>> low_rank = LowRank(ratio=0.5)
    >>> low_rank.rank_for((64, 64))
    16
    >>> low_rank.fit(torch.ones(64, 64)).nbytes
    8192
    """

    name: ClassVar[str] = "low_rank"
    summary: ClassVar[str] = "product of two thin matrices: SVD, weighted by the data where there is any"
    optimal_on_data: ClassVar[bool] = True

    rank: int | None = field(default=None, metadata={"help": "the inner size r"})
    ratio: float | None = field(default=None, metadata={"help": "share of parameters kept, r = floor(ratio mn/(m+n))"})
    energy: float | None = field(default=None, metadata={"help": "share of ‖WX‖² kept: the least such r"})
    solver: str = field(default="auto", metadata={"help": "'exact', 'randomized', or 'auto': the second when large"})

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise FormError(f"{self.name}: solver is {self.solver!r}; {nearest(self.solver, SOLVERS)}")
        given = {name: value for name in ("rank", "ratio", "energy") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            found = f"{' and '.join(given)} are given together" if given else "no parameter is given"
            raise FormError(f"{self.name}: {found}; one of rank=64, ratio=0.5, energy=0.99 would work")
        if self.rank is not None and self.rank < 1:
            raise FormError(f"{self.name}: rank is {self.rank}, not positive; 1 or more would work")
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise FormError(f"{self.name}: ratio is {self.ratio}, not positive; 0.5 would keep half of the parameters")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise FormError(f"{self.name}: energy is {self.energy}, not in (0, 1]; 0.99 would work")

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        # low_rank(64) is a rank, low_rank(0.5) a ratio.
        return ["ratio" if type(values[0]) is float else "rank"] if values else []

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        small = min(shape)
        found: list[NamedForm] = [cls(rank=max(1, small // 4)), cls(rank=small), cls(energy=0.9)]
        if cls(ratio=0.5).problem(shape) is None:
            found.append(cls(ratio=0.5))
        return found

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        small = min(shape)
        return [cls(rank=rank) for rank in sorted({1, max(1, small // 3), max(1, small // 2), small})]

    @property
    def fixed_point(self) -> bool:
        # A share of the energy is cut off again each time.
        return self.energy is None

    def rank_for(self, shape: tuple[int, int]) -> int | None:
        """Return the rank for a weight (m, n), or None where it depends on the weight."""
        m, n = shape
        if self.ratio is not None:
            # The small excess undoes the rounding of ratios that stand for whole ranks.
            return int(self.ratio * m * n / (m + n) * (1 + 1e-12))
        return self.rank

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        m, n = shape
        rank, largest = self.rank_for(shape), min(m, n)
        if rank is None or 1 <= rank <= largest:
            return None
        if self.ratio is not None and rank < 1:
            return f"keeps no rank at ratio {self.ratio}", f"ratio {_ceil((m + n) / (m * n))} or more would work"
        if self.ratio is not None:
            return (
                f"has rank at most {largest}, ratio {self.ratio} asks for {rank}",
                f"ratio {_floor((m + n) / max(m, n))} or less would work (below 1 to save anything)",
            )
        return (
            f"has rank at most {largest}, asked {rank}",
            f"{largest} or less would work, {f'{saves} or less' if (saves := m * n // (m + n)) else 'none'} saves parameters",
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Product | None:
        rank = self.rank_for(shape)
        if rank is None:
            return None
        left = torch.empty(shape[0], rank, dtype=dtype, device="meta")
        return Product(Dense(left), Dense(torch.empty(rank, shape[1], dtype=dtype, device="meta")))

    def solve(self, weight: Tensor, stats: Stats | None) -> Product:
        gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device)
        rank = self.rank_for((weight.shape[0], weight.shape[1]))
        left = self.subspace(weight, gram, rank)
        return factors(left, times(weight.T, left).T, weight.dtype)

    def subspace(self, weight: Tensor, gram: Tensor | None, rank: int | None) -> Tensor:
        """Return the output directions (m, r) that are kept, as the rank, the energy and the solver say."""
        return leading_subspace(weight, gram, rank=rank, energy=self.energy or 1.0, solver=self.solver)


def factors(left: Tensor, right: Tensor, dtype: torch.dtype) -> Product:
    """Return ``left @ right`` as two stored factors, float64 (m, r) and (r, n) in.

    Norms of each column and its row are made equal, which for the plain SVD is the split of the roots: no factor over-
    or underflows.
    """
    ahead, behind = left.norm(dim=0), right.norm(dim=1)
    size = (behind / torch.where(ahead > 0, ahead, 1)).sqrt()
    size = torch.where(size > 0, size, 1)
    return Product(
        Dense((left * size).to(dtype).contiguous()), Dense((right / size.unsqueeze(1)).to(dtype).contiguous())
    )


def _ceil(value: float) -> float:
    return -(-int(value * 1e4 + 1) // 1) / 1e4


def _floor(value: float) -> float:
    return int(value * 1e4) / 1e4
