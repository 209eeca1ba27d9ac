"""Block-diagonal weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul import reference
from recast.passes.forms.algebra import DirectSum
from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import solve_consistent
from recast.passes.forms.operator import Cost, Dense, Operator, Refit, matmul_cost
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["BlockDiagonal", "BlockDiagonalForm", "even_split"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Operator):
    """Dense blocks (b, m/b, n/b) on the diagonal."""

    kind: ClassVar[str] = "block_diagonal"
    blocks: Tensor

    def __post_init__(self) -> None:
        if self.blocks.dim() != 3:
            raise ValueError(
                f"block_diagonal: blocks have three dimensions, these have shape {tuple(self.blocks.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        b, p, q = self.blocks.shape
        return (b * p, b * q)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    def apply(self, x: Tensor) -> Tensor:
        return reference.block_diagonal_matmul(x, self.blocks.to(x.dtype))

    def to_dense(self) -> Tensor:
        return reference.block_diagonal_to_dense(self.blocks)

    def cost(self, tokens: int) -> Cost:
        return matmul_cost(self.shape, 2 * self.blocks.numel() * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"blocks": self.blocks}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["blocks"])

    def to(self, dtype: torch.dtype) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.to(dtype))

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        parts = DirectSum(tuple(Dense(block) for block in self.blocks)).refit(fit, stats, path)
        blocks = [part.weight for part in parts.children().values() if isinstance(part, Dense)]
        whole = len(blocks) == len(self.blocks) and len({block.shape for block in blocks}) == 1
        return BlockDiagonal(torch.stack(blocks)) if whole else parts


@dataclass(frozen=True)
class BlockDiagonalForm(NamedForm):
    """`blocks` equal blocks on the diagonal: m n / blocks values, no mixing between blocks.

    With statistics each block row solves its least-squares problem: it takes over what it can of the inputs it does not
    see from those it sees.

    Examples
    --------
    >>> BlockDiagonalForm(2).fit(torch.ones(2, 2)).to_dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    name: ClassVar[str] = "block_diagonal"
    summary: ClassVar[str] = "equal dense blocks on the diagonal, each the least-squares best on the data"

    blocks: int = field(metadata={"help": "how many; must divide both sizes"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise FormError(f"block_diagonal: blocks is {self.blocks}, not positive; 4 would work")

    @property
    def wrapper(self) -> bool:
        return True

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        common = _divisors(math.gcd(*shape))
        return [cls(b) for b in sorted({1, common[len(common) // 2], common[-1]})]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        # Each number of blocks divides the one before it, so that the blocks hold those before them.
        chain = [math.gcd(*shape)]
        while chain[-1] > 1:
            chain.append(_divisors(chain[-1])[-2])
        return [cls(b) for b in chain]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        return even_split(shape, self.blocks)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> BlockDiagonal:
        m, n = shape
        b = self.blocks
        return BlockDiagonal(torch.empty(b, m // b, n // b, dtype=dtype, device="meta"))

    def solve(self, weight: Tensor, stats: Stats | None) -> BlockDiagonal:
        m, n = weight.shape
        b, p, q = self.blocks, m // self.blocks, n // self.blocks
        diagonal = torch.arange(b, device=weight.device)
        own = weight.reshape(b, p, b, q)[diagonal, :, diagonal, :]
        if stats is None or stats.gram is None:
            return BlockDiagonal(own.contiguous())
        gram = stats.gram.to(weight.device, torch.float64)
        solved = []
        for i in range(b):
            rows, seen = weight[i * p : (i + 1) * p].double(), slice(i * q, (i + 1) * q)
            # min over B of ‖(W_i - B E_i) X‖: the block itself, plus the rest of the row as far as the block's inputs
            # predict it.
            within = gram[seen, seen]
            rest = rows @ gram[:, seen] - rows[:, seen] @ within
            solved.append(rows[:, seen] + solve_consistent(rest, within))
        return BlockDiagonal(torch.stack(solved).to(weight.dtype))


def even_split(shape: tuple[int, int], blocks: int) -> tuple[str, str] | None:
    """Say which side of a weight does not split into so many blocks, and which numbers nearby would, or None."""
    uneven = [size for size in shape if size % blocks]
    if not uneven:
        return None
    common = _divisors(math.gcd(*shape))
    below = [b for b in common if b < blocks][-1:]
    above = [b for b in common if b > blocks][:1]
    works = " or ".join(str(b) for b in below + above)
    return (
        f"does not split into {blocks} blocks ({uneven[0]} % {blocks} = {uneven[0] % blocks})",
        f"{works} would",
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
