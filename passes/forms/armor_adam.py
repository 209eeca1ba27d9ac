"""ARMOR's search as published: a step of Adam on all factors in turns with an exact update of a pair in every tile."""

# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.armor_fit import ArmorFactors, ArmorSearch, best_pairs

__all__ = ["AdamSearch"]

# Adam's usual constants.
_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8
# How often the best factors seen are put aside.
_KEEP_EVERY = 20


class _Adam:
    """Adam on one tensor, in place."""

    def __init__(self, parameter: Tensor, rate: float) -> None:
        self.parameter, self.rate, self.steps = parameter, rate, 0
        self.first, self.second = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def moments(self) -> dict[str, Tensor]:
        """Return what is remembered of the gradients."""
        return {"first": self.first, "second": self.second}

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.first.lerp_(gradient, 1 - _BETA1)
        self.second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        root = self.second.sqrt().div_((1 - _BETA2**self.steps) ** 0.5).add_(_ADAM_EPS)
        self.parameter.addcdiv_(self.first, root, value=-self.rate / (1 - _BETA1**self.steps))


class AdamSearch(ArmorSearch):
    """Steps of Adam on A, B and C, `rate` their size; each after an exact update of one pair in every tile.

    Attributes
    ----------
    factors
        As they are now; changed in place.
    """

    patience: ClassVar[int] = 100
    rtol: ClassVar[float] = 1e-6

    def __init__(self, target: Tensor, weights: Tensor, factors: ArmorFactors, features: int, **settings: Any) -> None:
        super().__init__(target, weights, factors, features, **settings)
        self.factors = factors
        self.adam = [_Adam(part, self.rate) for part in (factors.left, factors.core, factors.right)]
        self._best, self._lowest = factors.copy(), torch.full((), torch.inf, dtype=torch.float64)

    def run(self, iterations: int, progress: bool | None = None) -> ArmorFactors:
        self._lowest.fill_(self.loss())
        return super().run(iterations, progress)

    def found(self) -> ArmorFactors:
        return self.factors if self.loss() <= float(self._lowest) else self._best

    def advance(self) -> float:
        loss = super().advance()
        if len(self.losses) % _KEEP_EVERY == 0 and (now := self.loss()) < float(self._lowest):
            self._best = self.factors.copy()
            self._lowest.fill_(now)
        return loss

    def _held(self) -> dict[str, Tensor]:
        return {
            **{f"factor{i}": t for i, t in enumerate(self.factors.tensors())},
            **{f"best{i}": t for i, t in enumerate(self._best.tensors())},
            **{f"{name}{i}": t for i, adam in enumerate(self.adam) for name, t in adam.moments().items()},
            "lowest": self._lowest,
        }

    def _go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super()._go_on(tensors, facts)
        for adam in self.adam:
            adam.steps = len(self.losses)

    def loss(self) -> float:
        """Return the objective at the factors as they are."""
        return float((self._product()[1].square() * self.weights).sum(dtype=torch.float64))

    def _product(self) -> tuple[Tensor, Tensor]:
        """Return C B and A C B - W̄, (rows, columns) both."""
        rows, columns = self.target.shape
        d = self.block
        core = self.factors.core.reshape(rows, -1, d).transpose(0, 1)  # (tiles across, rows, d)
        inner = torch.bmm(core, self.factors.right).transpose(0, 1).reshape(rows, columns)
        outer = torch.bmm(self.factors.left, inner.reshape(-1, d, columns)).reshape(rows, columns)
        return inner, outer - self.target

    def _step(self) -> float:
        """Update one pair in each tile, then all factors by Adam; return the loss at the beginning."""
        rows, columns = self.target.shape
        (down, across), d = self.tiles, self.block
        left, right = self.factors.left, self.factors.right
        inner, gap = self._product()
        error = gap * self.weights
        loss = float((gap * error).sum(dtype=torch.float64))
        # ∂/∂(C B) and ∂/∂C, halved; the latter at the places that are not kept, too.
        behind = torch.bmm(left.transpose(1, 2), error.reshape(down, d, columns)).reshape(rows, columns)
        slope = torch.bmm(behind.reshape(rows, across, d).transpose(0, 1), right.transpose(1, 2))
        slope = slope.transpose(0, 1).reshape(rows, columns)
        row, group, change = self._update_pairs(slope)
        # What changed is of rank one in each tile: the residual and the slopes follow exactly.
        tile = torch.arange(down * across, device=row.device)
        i, j = tile // across, tile % across
        moved = torch.bmm(change.unsqueeze(1), self._group_rows(j, group)).squeeze(1)  # of row p of C B, (tiles, d)
        stripes = torch.zeros(down, d, across, d, dtype=gap.dtype, device=gap.device)
        stripes[i, row, j] = moved
        inner += stripes.reshape(rows, columns)
        pushed = left[i, :, row].reshape(down, across, d)  # column p of A
        weighted = (moved * self.weights.reshape(across, d)[j]).reshape(down, across, 1, d)
        error = error.reshape(down, d, across, d)
        error += (pushed.unsqueeze(-1) * weighted).transpose(1, 2)
        error = error.reshape(rows, columns)
        again = torch.bmm(pushed, left).reshape(down, across, d, 1)  # Aᵀ a
        steps = again * weighted
        behind = (behind.reshape(down, d, across, d) + steps.transpose(1, 2)).reshape(rows, columns)
        bent = torch.matmul(weighted, right.transpose(1, 2))  # (down, across, 1, d)
        slope = (slope.reshape(down, d, across, d) + (again * bent).transpose(1, 2)).reshape(rows, columns)
        # Gradients at the factors as they are now, then one step of all three.
        by_tile = behind.reshape(rows, across, d).transpose(0, 1)
        core = self.factors.core.reshape(rows, across, d).transpose(0, 1)
        to_right = torch.bmm(core.transpose(1, 2), by_tile)
        to_left = torch.bmm(error.reshape(down, d, columns), inner.reshape(down, d, columns).transpose(1, 2))
        for adam, gradient in zip(self.adam, (to_left, slope * self.factors.mask, to_right), strict=True):
            adam.step(2 * gradient)
        self.factors.core.mul_(self.factors.mask)
        return loss

    def _group_rows(self, j: Tensor, group: Tensor) -> Tensor:
        """Return the four rows of B of one group in each tile, (tiles, 4, d)."""
        d = self.block
        return self.factors.right.reshape(len(self.factors.right), d // 4, 4, d)[j, group]

    def _update_pairs(self, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose one group in each tile and set its two values; return its row, its number and what was added."""
        (down, across), d = self.tiles, self.block
        tiles = slope.reshape(down, d, across, d // 4, 4).permute(0, 2, 1, 3, 4).reshape(down * across, d * d // 4, 4)
        chosen = self._choose(tiles.abs().sum(-1))
        tile = torch.arange(down * across, device=slope.device)
        i, j = tile // across, tile % across
        row, group = chosen // (d // 4), chosen % (d // 4)
        grouped = self.factors.core.view(down, d, across, d // 4, 4)
        masked = self.factors.mask.view(down, d, across, d // 4, 4)
        current = grouped[i, row, j, group]
        rows = self._group_rows(j, group).double()
        quadratic = (rows * self.weights.reshape(across, 1, d)[j].double()) @ rows.transpose(1, 2)
        size = self.factors.left[i, :, row].double().square().sum(1)
        linear = tiles[tile, chosen].double() - size.unsqueeze(1) * (quadratic @ current.double().unsqueeze(2)).squeeze(
            2
        )
        allowed = self.inputs.reshape(across, d // 4, 4)[j, group]
        found, kept, gain = best_pairs(linear, quadratic, size, current, allowed)
        better = (gain > 0).unsqueeze(1)
        masked[i, row, j, group] = torch.where(better, kept, masked[i, row, j, group])
        grouped[i, row, j, group] = torch.where(better, found, current)
        self.gains.append(float(gain.sum()))
        return row, group, torch.where(better, found - current, 0)
