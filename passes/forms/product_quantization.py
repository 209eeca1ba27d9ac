"""Weights that share a few short vectors, found by clustering."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import pack_codes
from recast.passes.forms.codebook import Codebook, outline_table
from recast.passes.forms.form import NamedForm
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["ProductQuantization", "assign", "cluster_vectors"]

# Rounds of clustering, vectors of each block that take part in them, and vectors that are compared at once.
_ROUNDS = 25
_SAMPLE = 1 << 16
_SLAB = 1 << 12


def assign(vectors: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest centre (L,) of vectors (L, d) under ``Σ weights (x - c)²``, weights (L, d)."""
    # Filled in place: small results kept between large temporaries would scatter the heap, gigabytes of it.
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), _SLAB):
        x, w = vectors[start : start + _SLAB], weights[start : start + _SLAB]
        distance = w @ centres.square().T - 2 * (w * x) @ centres.T
        found[start : start + _SLAB] = distance.argmin(1)
    return found


def cluster_vectors(vectors: Tensor, weights: Tensor, count: int) -> Tensor:
    """Find `count` centres (count, d) of vectors (L, d) with weights (L, d), by Lloyd's rounds; the same each time.

    Starts are drawn one after the other with a probability that grows with the distance to those drawn (k-means++), from a
    fixed seed. Where there are no more than `count` different vectors, these are the centres.
    """
    different = (
        torch.unique(vectors[: 64 * count], dim=0) if len(vectors) > 64 * count else torch.unique(vectors, dim=0)
    )
    if len(different) <= count and len(torch.unique(vectors, dim=0)) <= count:
        return torch.cat([different, different[-1:].expand(count - len(different), -1)])
    generator = torch.Generator().manual_seed(0)
    if len(vectors) > _SAMPLE:
        chosen = torch.randperm(len(vectors), generator=generator)[:_SAMPLE].to(vectors.device)
        vectors, weights = vectors[chosen], weights[chosen]
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    centres = vectors[:1]
    nearest = torch.full((len(vectors),), torch.inf, dtype=vectors.dtype, device=vectors.device)
    for draw in draws[1:]:
        nearest = torch.minimum(nearest, (weights * (vectors - centres[-1]).square()).sum(1))
        chances = nearest.double().cumsum(0)
        place = int(torch.searchsorted(chances, draw * float(chances[-1])).clamp_max(len(vectors) - 1))
        centres = torch.cat([centres, vectors[place : place + 1]])
    for _ in range(_ROUNDS):
        codes = assign(vectors, weights, centres)
        held = torch.zeros_like(centres).index_add_(0, codes, weights)
        sums = torch.zeros_like(centres).index_add_(0, codes, weights * vectors)
        moved = torch.where(held > 0, sums / torch.where(held > 0, held, 1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


@dataclass(frozen=True)
class ProductQuantization(NamedForm):
    """``W[i, d p : d p + d] ≈ table[code[i, p]]``: a code of `bits` for each `dim` neighbouring inputs of a row.

    bits/dim bits a value, and tables of 2^bits vectors: one for all places, or one for each of `books` stretches of a
    row's inputs. With data, errors are weighted by the mean square of each input.

    Notes
    -----
    Jégou et al., Product Quantization for Nearest Neighbor Search (2011); the vector form of Cho et al., eDKM (2023).

    Examples
    --------
    >>> ProductQuantization().fit(torch.randn(64, 64)).nbytes  # 64 x 16 codes of a byte, 256 vectors of 4 floats
    5120
    """

    name: ClassVar[str] = "product_quantization"
    summary: ClassVar[str] = "codes for short vectors of neighbouring inputs, found by clustering"

    bits: int = field(default=8, metadata={"help": "of a code: a table has 2^bits vectors"})
    dim: int = field(default=4, metadata={"help": "neighbouring inputs that a code stands for"})
    books: int = field(default=1, metadata={"help": "stretches of a row's inputs with a table of their own"})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormError(f"product_quantization: bits is {self.bits}; 1 to 8 would work")
        if self.dim < 1 or self.books < 1:
            raise FormError(
                f"product_quantization: dim is {self.dim} and books is {self.books}; positive ones, 4 and 1, would work"
            )

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def fixed_point(self) -> bool:
        # The last piece of a row may be filled up; what fills it counts as zero the next time.
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(bits=4, dim=3), cls(bits=3, dim=2, books=2)]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        pieces = -(-shape[1] // self.dim)
        if self.books <= pieces:
            return None
        return (
            f"has {pieces} pieces of {self.dim} inputs in a row, fewer than {self.books} books",
            f"{pieces} would work",
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Codebook:
        return outline_table(shape, dtype, bits=self.bits, scaled=False, tables=(1, self.books), dim=self.dim)

    def solve(self, weight: Tensor, stats: Stats | None) -> Codebook:
        m, n = weight.shape
        d, pieces = self.dim, -(-n // self.dim)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Squares of very small or large values leave the range of float32; a power of two is exact.
        unit = torch.exp2(torch.floor(torch.log2(wide.abs().max().clamp_min(torch.finfo(wide.dtype).tiny))))
        cut = torch.nn.functional.pad(wide / unit, (0, pieces * d - n)).reshape(m, pieces, d)
        importance = torch.ones(n, dtype=wide.dtype, device=wide.device)
        if stats is not None and stats.gram is not None and bool((stats.gram.diagonal() > 0).any()):
            seen = stats.gram.diagonal().to(wide.device).clamp_min(0)
            importance = (seen / seen.mean()).to(wide.dtype)
        weights = torch.nn.functional.pad(importance, (0, pieces * d - n)).reshape(pieces, d)
        codes = torch.empty(m, pieces, dtype=torch.uint8, device=wide.device)
        tables = []
        block = torch.arange(pieces, device=wide.device) * self.books // pieces
        for book in range(self.books):
            own = (block == book).nonzero()[:, 0]
            vectors, each = cut[:, own].reshape(-1, d), weights[own].repeat(m, 1)
            tables.append(cluster_vectors(vectors, each, 2**self.bits))
            codes[:, own] = assign(vectors, each, tables[-1]).reshape(m, -1).to(torch.uint8)
        table = torch.stack(tables).unsqueeze(0) * unit
        return Codebook(pack_codes(codes, self.bits), table, None, None, None, self.bits, None, (m, n), weight.dtype)
