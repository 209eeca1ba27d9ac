"""Block-diagonal weights in an order of features that is found, not given."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.block_diagonal import BlockDiagonalForm
from recast.passes.forms.form import NamedForm, data_error
from recast.passes.forms.linear_algebra import leading_subspace
from recast.passes.forms.operator import Operator
from recast.passes.forms.permutation import Permutation
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["PermutedBlockDiagonal"]

# Above this size features are dealt out to blocks greedily; the exact assignment takes the cube of it.
_EXACT = 1024
_ROUNDS = 20


@dataclass(frozen=True)
class PermutedBlockDiagonal(NamedForm):
    """W ≈ P B Q: B block-diagonal, P and Q permutations that bring inputs and outputs together which belong together.

    m n / blocks values and m + n indices. The permutations make the squares of W inside the blocks, weighted by the power
    of the inputs where it is known, as large as can be: co-clustering into groups of equal size, from the order as it is
    and from a spectral start, inputs and outputs in turns. Never worse than `block_diagonal`, and much better where
    outputs read few inputs.

    Notes
    -----
    The spectral start takes the leading singular vectors of the normalised squares (Dhillon, Co-clustering documents and
    words using bipartite spectral graph partitioning, 2001) and reads groups off by a pivoted QR (Damle, Minden and Ying,
    Simple, direct and efficient multi-way spectral clustering, 2018): a permuted block-diagonal matrix is found again.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0]])
    >>> torch.equal(PermutedBlockDiagonal(2).fit(weight).to_dense(), weight)
    True
    """

    name: ClassVar[str] = "permuted_block_diagonal"
    summary: ClassVar[str] = "dense blocks on the diagonal after inputs and outputs are sorted into groups"

    blocks: int = field(metadata={"help": "how many; must divide both sizes"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise FormError(f"{self.name}: blocks is {self.blocks}, not positive; 4 would work")

    @property
    def wrapper(self) -> bool:
        return True

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [
            cls(form.blocks) for form in BlockDiagonalForm.examples(shape)[1:2] if isinstance(form, BlockDiagonalForm)
        ]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        return BlockDiagonalForm(self.blocks).problem(shape)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        rows, columns = (Permutation(torch.empty(size, dtype=torch.int32, device="meta"), dtype) for size in shape)
        return Product(rows, Product(BlockDiagonalForm(self.blocks).outline(shape, dtype), columns))

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device, torch.float64)
        power = weight.double().square()
        if gram is not None:
            power = power * gram.diagonal()
        given = tuple(torch.arange(size, device=weight.device) * self.blocks // size for size in weight.shape)
        starts = [given, *([_spectral(power, self.blocks)] if self.blocks > 1 else [])]
        found = [_improved(power, rows, columns, self.blocks) for rows, columns in starts]
        del power
        made = [self._operator(weight, gram, rows, columns) for rows, columns in found]
        if gram is not None:  # what the blocks take over from other inputs may favour the order as it is
            made.append(self._operator(weight, gram, *given))
        return min(made, key=lambda operator: data_error(weight, operator, stats))

    def _operator(self, weight: Tensor, gram: Tensor | None, rows: Tensor, columns: Tensor) -> Operator:
        # Members of a group keep their order, so that labels which change nothing make the identity.
        row_order, column_order = rows.argsort(stable=True), columns.argsort(stable=True)
        moved = None if gram is None else Stats.from_gram(gram[column_order.unsqueeze(1), column_order])
        inner = BlockDiagonalForm(self.blocks).solve(weight[row_order][:, column_order], moved)
        before = Permutation(column_order.to(torch.int32), weight.dtype)
        return Product(Permutation(row_order.argsort().to(torch.int32), weight.dtype), Product(inner, before))


def _improved(power: Tensor, rows: Tensor, columns: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Assign outputs, then inputs, to the groups where they have most, until nothing is gained."""

    def inside(rows: Tensor, columns: Tensor) -> float:
        return float(power[rows.unsqueeze(1) == columns].sum())

    best = inside(rows, columns)
    for _ in range(_ROUNDS):
        new_rows = _balanced(power @ _members(columns, blocks))
        new_columns = _balanced(power.T @ _members(new_rows, blocks))
        found = inside(new_rows, new_columns)
        if found <= best * (1 + 1e-9):
            break
        rows, columns, best = new_rows, new_columns, found
    return rows, columns


def _members(labels: Tensor, blocks: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, blocks).double()


def _balanced(gain: Tensor) -> Tensor:
    """Labels (k,) that make the sum of ``gain[i, label]`` large, every one of the labels given to as many i."""
    count, blocks = gain.shape
    room = count // blocks
    if count <= _EXACT:
        import scipy.optimize

        _, places = scipy.optimize.linear_sum_assignment(gain.repeat_interleave(room, 1).cpu().numpy(), maximize=True)
        return torch.from_numpy(places // room).to(gain.device)
    # Whoever would lose most by the second choice chooses first.
    top = gain.topk(min(2, blocks), dim=1).values
    wishes = gain.argsort(dim=1, descending=True).tolist()
    left, labels = [room] * blocks, [0] * count
    for i in (top[:, 0] - top[:, -1]).argsort(descending=True).tolist():
        labels[i] = next(label for label in wishes[i] if left[label])
        left[labels[i]] -= 1
    return torch.tensor(labels, device=gain.device)


def _spectral(power: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    import scipy.linalg

    tiny = torch.finfo(power.dtype).tiny
    normal = power / power.sum(1, keepdim=True).clamp_min(tiny).sqrt() / power.sum(0).clamp_min(tiny).sqrt()
    vectors = leading_subspace(normal, None, rank=min(blocks, *power.shape))
    _, _, pivots = scipy.linalg.qr(vectors.T.cpu().numpy(), mode="economic", pivoting=True)
    chosen = vectors[torch.from_numpy(pivots[:blocks].copy()).long().to(vectors.device)]
    rows = _balanced((vectors @ torch.linalg.pinv(chosen)).abs())
    return rows, _balanced(power.T @ _members(rows, blocks))
