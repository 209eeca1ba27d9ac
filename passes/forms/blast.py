"""BLAST: blocks that share their bases along rows and columns of the grid, each with a diagonal of its own."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.coupling_matmul.reference import coupling_matmul
from recast.passes.forms.algebra import Product
from recast.passes.forms.blast_fit import fit_blast
from recast.passes.forms.block_diagonal import BlockDiagonal, even_split
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Cost, Operator, matmul_cost
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Blast", "Coupling"]


@dataclass(frozen=True, eq=False, repr=False)
class Coupling(Operator):
    """y_i = Σ_j d_ij ∘ x_j over groups of r features each, with `weights` (I, J, r)."""

    kind: ClassVar[str] = "coupling"
    applied: ClassVar[bool] = True
    weights: Tensor

    def __post_init__(self) -> None:
        if self.weights.dim() != 3:
            raise ValueError(f"coupling: weights (I, J, r) are needed, these have shape {tuple(self.weights.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        to, of, rank = self.weights.shape
        return (to * rank, of * rank)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def apply(self, x: Tensor) -> Tensor:
        return coupling_matmul(x, self.weights)

    def to_dense(self) -> Tensor:
        return torch.diag_embed(self.weights).transpose(1, 2).reshape(self.shape)

    def cost(self, tokens: int) -> Cost:
        return matmul_cost(self.shape, 2 * self.weights.numel() * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["weights"])

    def to(self, dtype: torch.dtype) -> Coupling:
        return Coupling(self.weights.to(dtype))


@dataclass(frozen=True)
class Blast(NamedForm):
    """W_ij ≈ B_i diag(d_ij) C_jᵀ for a grid of b x b blocks: r (m + n + b²) values.

    Holds low rank (all d alike), block-diagonal and block low-rank matrices; it starts from the low-rank fit of the same
    rank and is never worse than that. `fit_blast` says how it goes on from there.

    Notes
    -----
    Lee et al., BLAST: Block-Level Adaptive Structured Matrices for Efficient Deep Neural Network Inference (2024), with
    their 16 x 16 blocks at half the parameters.

    Examples
    --------
    >>> Blast(blocks=4, rank=8).fit(torch.randn(32, 64)).nbytes == 4 * 8 * (32 + 64 + 16)
    True
    """

    name: ClassVar[str] = "blast"
    summary: ClassVar[str] = "blocks B_i diag(d_ij) C_j that share bases along rows and columns of the grid"

    blocks: int = field(default=16, metadata={"help": "rows and columns of the grid; must divide both sizes"})
    rank: int | None = field(default=None, metadata={"help": "the inner size r"})
    ratio: float | None = field(default=None, metadata={"help": "share of parameters kept; 0.5 if no rank is given"})
    iterations: int = field(default=300, metadata={"help": "rounds of the fit at most"})

    def __post_init__(self) -> None:
        for name in ("blocks", "rank", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FormError(f"blast: {name} is {value}, not positive; 1 or more would work")
        if self.rank is not None and self.ratio is not None:
            raise FormError("blast: rank and ratio are given together; one of them would work")
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise FormError(f"blast: ratio is {self.ratio}, not positive; 0.5 would keep half of the parameters")

    @property
    def fixed_point(self) -> bool:
        # The problem is not convex: the start may lead elsewhere.
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        blocks = next(b for b in (4, 3, 2, 1) if math.gcd(*shape) % b == 0)
        return [cls(blocks, max(1, min(shape) // 4), iterations=8)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        blocks = next(b for b in (4, 3, 2, 1) if math.gcd(*shape) % b == 0)
        small = min(shape)
        return [cls(blocks, rank, iterations=8) for rank in sorted({1, max(1, small // 2), small})]

    def rank_for(self, shape: tuple[int, int]) -> int:
        """Return the inner size for a weight (m, n); 0 where the ratio leaves none."""
        m, n = shape
        ratio = 0.5 if self.ratio is None else self.ratio
        return self.rank or int(ratio * m * n / (m + n + self.blocks**2) * (1 + 1e-12))

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        uneven = even_split(shape, self.blocks)
        if uneven is not None:
            return uneven
        rank, largest = self.rank_for(shape), min(shape)
        if rank > largest:
            return f"has rank at most {largest}, asked {rank}", f"rank {largest} or less would work"
        if rank:
            return None
        m, n = shape
        least = (m + n + self.blocks**2) / (m * n)
        fewer = " or fewer blocks" if self.blocks > 1 else ""
        return (
            f"keeps no rank in {self.blocks} x {self.blocks} blocks",
            f"ratio {least * 1.001:.4g} or more{fewer} would work",
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        (m, n), b, rank = shape, self.blocks, self.rank_for(shape)
        sizes = [(b, m // b, rank), (b, b, rank), (b, n // b, rank)]
        return _assemble(*(torch.empty(size, dtype=dtype, device="meta") for size in sizes))

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        gram = None if stats is None else stats.gram
        rank = self.rank_for((weight.shape[0], weight.shape[1]))
        return _assemble(*(t.to(weight.dtype) for t in fit_blast(weight, gram, self.blocks, rank, self.iterations)))


def _assemble(left: Tensor, weights: Tensor, right: Tensor) -> Operator:
    inner = Product(Coupling(weights.contiguous()), BlockDiagonal(right.mT.contiguous()))
    return Product(BlockDiagonal(left.contiguous()), inner)
