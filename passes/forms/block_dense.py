"""BlockDense: a block-diagonal matrix into a narrow space, a dense one out of it."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.block_products import fit_slices, outline_slices
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["BlockDense"]


@dataclass(frozen=True)
class BlockDense(NamedForm):
    """W ≈ U V with V block-diagonal (b blocks r/b by n/b) and U dense (m, r): r n/b + m r values.

    The columns of W that one block reads have rank r/b by themselves, so without data the best fit is a truncated SVD of
    each block of columns; with data U and the blocks of V are solved for in turns.

    Notes
    -----
    Wei et al., Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers (2024).
    Their width 512 at 768 features is the default: r = 2/3 min(m, n), down to a multiple of b.

    Examples
    --------
    >>> form = BlockDense()
    >>> form.rank_for((3072, 768)), form.fit(torch.randn(96, 24)).nbytes / (96 * 24 * 4)
    (512, 0.75)
    """

    name: ClassVar[str] = "block_dense"
    summary: ClassVar[str] = "block-diagonal into a narrow space, dense out of it"

    blocks: int = field(default=2, metadata={"help": "blocks of the first factor; must divide the inputs and the rank"})
    rank: int | None = field(default=None, metadata={"help": "the inner size r; 2/3 of the smaller side if not given"})
    ratio: float | None = field(default=None, metadata={"help": "share of parameters kept, in place of the rank"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise FormError(f"block_dense: blocks is {self.blocks}, not positive; 2 would work")
        if self.rank is not None and self.ratio is not None:
            raise FormError("block_dense: rank and ratio are given together; one of them would work")
        if self.rank is not None and (self.rank < 1 or self.rank % self.blocks):
            up = -(-max(self.rank, 1) // self.blocks) * self.blocks
            raise FormError(
                f"block_dense: rank is {self.rank}, not a multiple of the {self.blocks} blocks; {up} would work"
            )
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise FormError(f"block_dense: ratio is {self.ratio}, not positive; 0.5 would keep half of the parameters")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(next(b for b in (2, 3, 1) if shape[1] % b == 0))]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        blocks = next(b for b in (2, 3, 1) if shape[1] % b == 0)
        full = min(shape[0], shape[1] // blocks)
        return [cls(blocks, blocks * rank) for rank in sorted({1, max(1, full // 2), full})]

    def rank_for(self, shape: tuple[int, int]) -> int:
        """Return the inner size for a weight (m, n); 0 where the ratio leaves none."""
        m, n = shape
        if self.rank is not None:
            return self.rank
        if self.ratio is not None:
            return int(self.ratio * m * n / (m + n / self.blocks) * (1 + 1e-12)) // self.blocks * self.blocks
        return max(1, 2 * min(m, n) // 3 // self.blocks) * self.blocks

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        m, n = shape
        if n % self.blocks:
            fits = [b for b in range(1, n + 1) if n % b == 0]
            near = [b for b in fits if b < self.blocks][-1:] + [b for b in fits if b > self.blocks][:1]
            works = " or ".join(map(str, near))
            return (
                f"does not split into {self.blocks} blocks ({n} % {self.blocks} = {n % self.blocks})",
                f"{works} would",
            )
        rank, largest = self.rank_for(shape), self.blocks * min(m, n // self.blocks)
        if rank < 1:
            least = self.blocks * (m + n / self.blocks) / (m * n)
            return f"keeps no rank at ratio {self.ratio}", f"ratio {least * 1.001:.4g} or more would work"
        if rank > largest:
            return f"has an inner size of {largest} at most, asked {rank}", f"rank {largest} or less would work"
        return None

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        return outline_slices(shape, dtype, self.blocks, 1, self.rank_for(shape) // self.blocks)

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        rank = self.rank_for((weight.shape[0], weight.shape[1]))
        return fit_slices(weight, stats, self.blocks, 1, rank // self.blocks)
