"""ARMOR's objective by exact steps: least squares for A, for B and for the kept values of C in turns, and for pairs of C."""

# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.armor_fit import ArmorFactors, ArmorSearch, best_pairs

__all__ = ["AlternatingSearch"]

# Rows of a tile whose pairs are updated at once are so far apart.
_APART = 2
# How often a round comes to each row.
_SWEEPS = 2
# Steps of conjugate gradients on the kept values in one round.
_STEPS = 2
# What A and B are held to where they were, as a share of the mean of what is seen: for inputs that say nothing.
_NEAR = 1e-6
# Tiles are worked on so many values at a time: what stays in a core's cache.
_VALUES = 2**19


class AlternatingSearch(ArmorSearch):
    """Rounds of exact steps, none of which raises the loss.

    A round solves for A (``d x d`` normal equations for each of its blocks), then for each block of B (which alone decides its
    columns, so that their weights drop out), and in the tiles above that block updates pairs (`best_pairs`; a group in every
    second row at once, the slopes following) and takes steps of conjugate gradients on the values that are kept. `rate` has no meaning.

    All in tiles: C and W̄ are held as (blocks of B, blocks of A, d, d), so that no product needs another order.
    """

    patience: ClassVar[int] = 5
    rtol: ClassVar[float] = 3e-4

    def __init__(self, target: Tensor, weights: Tensor, factors: ArmorFactors, features: int, **settings: Any) -> None:
        super().__init__(target, weights, factors, features, **settings)
        d, (down, across) = self.block, self.tiles
        self.target = self._tiled(target)
        self.weights = weights.reshape(across, 1, 1, d)
        self.left, self.right = factors.left.clone(), factors.right.clone()
        self.core, self.mask = self._tiled(factors.core), self._tiled(factors.mask)
        self.allowed = self.inputs.reshape(across, d // 4, 4)
        self.width = max(1, _VALUES // (down * d * d))

    def loss(self) -> float:
        return sum(self._loss(part, self._inner(part)) for part in self._parts())

    def found(self) -> ArmorFactors:
        return ArmorFactors(self.left, self._untiled(self.core), self._untiled(self.mask), self.right)

    def _held(self) -> dict[str, Tensor]:
        return {"left": self.left, "core": self.core, "mask": self.mask, "right": self.right}

    def _tiled(self, matrix: Tensor) -> Tensor:
        d, (down, across) = self.block, self.tiles
        return matrix.reshape(down, d, across, d).permute(2, 0, 1, 3).contiguous()

    def _untiled(self, tiles: Tensor) -> Tensor:
        d, (down, across) = self.block, self.tiles
        return tiles.permute(1, 2, 0, 3).reshape(down * d, across * d)

    def _parts(self) -> Iterator[slice]:
        across = self.tiles[1]
        return (slice(start, min(start + self.width, across)) for start in range(0, across, self.width))

    def _inner(self, part: slice) -> Tensor:
        """C B of some blocks of columns, in tiles."""
        return torch.matmul(self.core[part], self.right[part].unsqueeze(1))

    def _loss(self, part: slice, inner: Tensor) -> float:
        gap = torch.matmul(self.left, inner).sub_(self.target[part])
        return float(gap.square_().mul_(self.weights[part]).sum(dtype=torch.float64))

    def _step(self) -> float:
        loss = self._solve_left()
        gained = 0.0
        gram = self.left.mT @ self.left
        for part in self._parts():
            self._solve_right(part)
            gained += self._improve(part, gram)
        self.gains.append(gained)
        return loss

    def _solve_left(self) -> float:
        """Set A to its least squares, ``A_i = (Σ_j W̄ D Pᵀ) (Σ_j P D Pᵀ)⁻¹`` with P = C B; return the loss before."""
        seen, mixed = torch.zeros_like(self.left), torch.zeros_like(self.left)
        loss = 0.0
        for part in self._parts():
            inner = self._inner(part)
            loss += self._loss(part, inner)
            weighted = inner * self.weights[part]
            seen += (weighted @ inner.mT).sum(0)
            mixed += (self.target[part] @ weighted.mT).sum(0)
        self.left.copy_(_solved(seen, mixed.mT, self.left.mT).mT)
        return loss

    def _solve_right(self, part: slice) -> None:
        """Set blocks of B to their least squares, ``B_j = (Mᵀ M)⁻¹ Mᵀ W̄_j`` with M = A C_j."""
        d = self.block
        outer = torch.matmul(self.left, self.core[part]).flatten(1, 2)  # (blocks, rows, d)
        mixed = outer.mT @ self.target[part].reshape(len(outer), -1, d)
        self.right[part] = _solved(outer.mT @ outer, mixed, self.right[part])

    def _improve(self, part: slice, gram: Tensor) -> float:
        """Update pairs and kept values of the tiles above some blocks of B; return what the pairs gained.

        The loss of a tile is ``tr(C L Cᵀ K) - 2 tr(H Cᵀ)`` and a constant: K = Aᵀ A (`gram`), L = B D Bᵀ, H = Aᵀ W̄ D Bᵀ.
        """
        right, core, mask = self.right[part], self.core[part], self.mask[part]
        across = (right * self.weights[part].squeeze(1)) @ right.mT  # L
        aimed = torch.matmul(self.left.mT, self.target[part] * self.weights[part])
        slope = torch.matmul(torch.matmul(gram, core), across.unsqueeze(1))
        slope -= torch.matmul(aimed, right.mT.unsqueeze(1))
        gained = sum(
            self._update_pairs(part, slope, gram, across, begin) for _ in range(_SWEEPS) for begin in range(_APART)
        )
        rest = slope.mul_(mask).neg_()
        direction, size = rest.clone(), _squares(rest, rest)
        for _ in range(_STEPS):
            turned = torch.matmul(torch.matmul(gram, direction), across.unsqueeze(1)).mul_(mask)
            bend = _squares(direction, turned)
            step = torch.where(bend > 0, size / torch.where(bend > 0, bend, 1), 0)
            core.addcmul_(direction, step)
            rest.addcmul_(turned, step, value=-1)
            before, size = size, _squares(rest, rest)
            direction.mul_(torch.where(before > 0, size / torch.where(before > 0, before, 1), 0)).add_(rest)
        return gained

    def _update_pairs(self, part: slice, slope: Tensor, gram: Tensor, across: Tensor, begin: int) -> float:
        """Set two values in a group of every second row of each tile; the slopes (blocks, down, d, d) follow. Returns the gain.

        Each group is at its optimum for the others as they were. Where together they gain less than the best of them alone,
        which the quadratic loss tells exactly, only that one is changed.
        """
        d, down = self.block, self.tiles[0]
        rows = torch.arange(begin, d, _APART, device=slope.device)
        count, tiles = len(rows), slope.shape[0] * down
        tile = torch.arange(tiles, device=slope.device)
        j, i = tile // down, tile % down
        slopes = slope.view(tiles, d, d // 4, 4)[:, begin::_APART].flatten(0, 1)  # (tiles * count, d / 4, 4)
        group = self._choose(slopes.abs().sum(-1))
        each, row = torch.arange(len(group), device=slope.device), rows.repeat(tiles)
        tile, j, i = (t.repeat_interleave(count) for t in (tile, j, i))
        cores, masks = (t[part].view(tiles, d, d // 4, 4) for t in (self.core, self.mask))
        current = cores[tile, row, group]
        seen = across.reshape(-1, d // 4, 4, d)[j, group]  # rows of L, (tiles * count, 4, d)
        places = (4 * group).unsqueeze(1) + torch.arange(4, device=slope.device)
        quadratic = seen.gather(2, places.unsqueeze(1).expand(-1, 4, -1)).double()
        size = gram[i, row, row].double()
        bent = (quadratic * current.double().unsqueeze(1)).sum(2)
        linear = slopes[each, group].double() - size.unsqueeze(1) * bent
        found, kept, gain = best_pairs(linear, quadratic, size, current, self.allowed[part][j, group])
        change = torch.where((gain > 0).unsqueeze(1), found - current, 0)
        pushed = (change.unsqueeze(2) * seen).sum(1).view(tiles, count, d)  # rows of (change L)
        columns = gram[:, :, begin::_APART].repeat(slope.shape[0], 1, 1)  # of K, (tiles, d, count)
        # What changes of two rows p and q add to the loss beyond their own: K_pq (change_p L)·change_q, twice.
        meet = pushed.gather(2, places.view(tiles, 1, -1).expand(-1, count, -1)).view(tiles, count, count, 4)
        mixed = torch.einsum("tpqv,tqv->tpq", meet, change.view(tiles, count, 4)) * columns[:, begin::_APART]
        own = mixed.diagonal(dim1=1, dim2=2).sum(1)
        gains = gain.view(tiles, count)
        together = gains.sum(1) - (mixed.sum((1, 2)) - own).double()
        best, which = gains.max(1)
        alone = torch.zeros_like(gains, dtype=torch.bool).scatter_(1, which.unsqueeze(1), True)
        taken = torch.where((together >= best).unsqueeze(1), gains > 0, alone & (gains > 0))
        better = taken.view(-1, 1)
        masks[tile, row, group] = torch.where(better, kept, masks[tile, row, group])
        cores[tile, row, group] = torch.where(better, found, current)
        slope.view(tiles, d, d).baddbmm_(columns, pushed.mul_(taken.unsqueeze(-1)))
        return float(torch.where(together >= best, together, best).sum())


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return sums of products over each tile, (..., 1, 1)."""
    sums: Tensor = torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))
    return sums.unsqueeze(-1).unsqueeze(-1)


def _solved(seen: Tensor, mixed: Tensor, before: Tensor) -> Tensor:
    """Return ``(S + εI)⁻¹ (M + ε X)`` for blocks S (b, d, d), M and X (b, d, k): least squares, near X where S says nothing."""
    square = seen.double()
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1)
    near = (_NEAR * torch.where(mean > 0, mean, 1)).reshape(-1, 1, 1)
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    found: Tensor = torch.linalg.solve(square + near * eye, mixed.double() + near * before.double())
    return found.to(before.dtype)
