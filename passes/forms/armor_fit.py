"""The search of ARMOR: Adam on all factors in turns with exact updates of pairs in the sparse core."""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast.passes.progress import track
from recast.passes.unfinished import unfinished
from recast.patterns.program import tensor_digest

__all__ = ["ArmorFactors", "ArmorSearch", "best_pairs"]

# The six ways to keep two of four.
PAIRS = tuple(itertools.combinations(range(4), 2))
# What is added to 2x2 systems before they are solved.
_RIDGE = 1e-9
# Adam's usual constants.
_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8
# The search ends when this many steps have not lowered the best loss by more than these.
_PATIENCE, _RTOL, _ATOL = 100, 1e-6, 1e-8
# How often the best factors seen are put aside.
_KEEP_EVERY = 20
# How often the state of a search is kept on disk, in seconds.
SAVE_EVERY = 60.0


@dataclass
class ArmorFactors:
    """``Ŵ = A C B``: A (rows/d, d, d), C (rows, columns) with two of every four inputs kept, B (columns/d, d, d)."""

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all four tensors."""
        return (self.left, self.core, self.mask, self.right)

    def copy(self) -> ArmorFactors:
        """Return factors of their own memory."""
        return ArmorFactors(*(t.clone() for t in self.tensors()))


def best_pairs(
    linear: Tensor, quadratic: Tensor, size: Tensor, current: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find in many groups of four the two values that minimise ``2 h·v + s vᵀ K v``, never above the current ones.

    Parameters
    ----------
    linear
        h (t, 4): the gradient, halved, with the group at zero.
    quadratic
        K (t, 4, 4), positive semi-definite.
    size
        s (t,).
    current
        (t, 4), two of each four at most not zero.
    allowed
        bool (t, 4), inputs that exist.

    Returns
    -------
    The new groups (t, 4), where they hold values, bool (t, 4), and by how much each lowers the objective, (t,).
    """
    h, k = linear.double(), quadratic.double()
    s, now = size.double(), current.double()
    tried, changes = [], []
    for i, j in PAIRS:
        a, b, d = k[:, i, i] + _RIDGE, k[:, i, j], k[:, j, j] + _RIDGE
        scale = s * (a * d - b * b)
        safe = torch.where(scale > 0, scale, 1)
        values = torch.zeros_like(h)
        values[:, i] = torch.where(scale > 0, (b * h[:, j] - d * h[:, i]) / safe, 0)
        values[:, j] = torch.where(scale > 0, (b * h[:, i] - a * h[:, j]) / safe, 0)
        change = _objective(values, h, k, s)
        # Of a last group with fewer than two inputs any pair will do that holds what there is.
        missing = ~(allowed[:, i] & allowed[:, j]) & (allowed.sum(1) >= 2)
        tried.append(values)
        changes.append(change.masked_fill(missing, torch.inf))
    changed = torch.stack(changes, 1)
    least, which = changed.min(1)
    before = _objective(now, h, k, s)
    better = least < before
    rows = torch.arange(len(h), device=h.device)
    values = torch.where(better.unsqueeze(1), torch.stack(tried, 1)[rows, which], now)
    pairs = torch.zeros(len(PAIRS), 4, dtype=torch.bool, device=h.device)
    for index, pair in enumerate(PAIRS):
        pairs[index, list(pair)] = True
    return values.to(current.dtype), pairs[which], torch.where(better, before - least, 0)


def _objective(v: Tensor, h: Tensor, k: Tensor, s: Tensor) -> Tensor:
    return 2 * (h * v).sum(1) + s * (v.unsqueeze(1) @ k @ v.unsqueeze(2)).reshape(-1)


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


class ArmorSearch:
    """Lower ``Σ_ij w_j (W̄ - A C B)²_ij`` from given factors.

    Parameters
    ----------
    target
        W̄ (rows, columns), both multiples of d; rows and columns past the weight's own are zero.
    weights
        w (columns,), zero for columns that are no inputs.
    factors
        Where to begin; changed in place.
    features
        How many of the columns are inputs.
    rate
        Adam's step size.
    greedy
        Take the group of the largest gradient in each tile in place of one drawn with its size as probability.
    seed
        Of what is drawn.
    """

    def __init__(
        self,
        target: Tensor,
        weights: Tensor,
        factors: ArmorFactors,
        features: int,
        *,
        rate: float,
        greedy: bool,
        seed: int,
    ) -> None:
        self.target, self.weights, self.factors = target, weights, factors
        self.greedy = greedy
        self.random = torch.Generator(device=target.device).manual_seed(seed)
        self.block = factors.left.shape[-1]
        self.tiles = (len(factors.left), len(factors.right))
        self.inputs = torch.arange(target.shape[1], device=target.device) < features
        self.adam = [_Adam(part, rate) for part in (factors.left, factors.core, factors.right)]
        self.losses: list[float] = []
        self.gains: list[float] = []  # of the updates of pairs, never negative

    def run(self, iterations: int, progress: bool | None = None) -> ArmorFactors:
        """Take so many steps, or fewer where they stop helping, and return the best factors seen, the first included.

        Inside a fit whose states are kept (`recast.passes.unfinished`), the search goes on where it was interrupted, and
        gives what it would have given without.
        """
        kept, name = unfinished(), self._name(iterations)
        self._best, self._lowest = self.factors.copy(), self.loss()
        self._least, self._stale, self._done = self._lowest, 0, 0
        if kept is not None and (state := kept.load(name)) is not None:
            self._go_on(*state)
        begun = saved = time.monotonic()
        for step in track(range(self._done, iterations), "armor", progress):
            if kept is not None and time.monotonic() - saved > SAVE_EVERY:
                kept.save(name, *self._state())
                saved = time.monotonic()
            loss = self.advance()
            self._stale = 0 if loss < self._least * (1 - _RTOL) - _ATOL else self._stale + 1
            self._least = min(self._least, loss)
            self._done = step + 1
            if self._stale >= _PATIENCE:
                self._done = iterations
                break
            if step % _KEEP_EVERY == _KEEP_EVERY - 1 and (now := self.loss()) < self._lowest:
                self._best, self._lowest = self.factors.copy(), now
        if kept is not None and time.monotonic() - begun > SAVE_EVERY:
            kept.save(name, *self._state())  # the fit may hold another search, which may be interrupted
        return self.factors if self.loss() <= self._lowest else self._best

    def advance(self) -> float:
        """Take one step; returns the loss at its beginning, which `losses` then ends with."""
        loss = self._step()
        self.losses.append(loss)
        return loss

    def _name(self, iterations: int) -> str:
        """What the search is of: its beginning and its settings."""
        begin = [tensor_digest(t) for t in (self.target, self.weights, *self.factors.tensors())]
        settings = (iterations, self.adam[0].rate, self.greedy, self.random.initial_seed())
        return hashlib.sha256("\n".join([*begin, repr(settings)]).encode()).hexdigest()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step rests on, and what was found so far."""
        moments = {f"{name}{i}": t for i, adam in enumerate(self.adam) for name, t in adam.moments().items()}
        tensors = {
            **{f"factor{i}": t for i, t in enumerate(self.factors.tensors())},
            **{f"best{i}": t for i, t in enumerate(self._best.tensors())},
            **moments,
            "random": self.random.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "gains": torch.tensor(self.gains, dtype=torch.float64),
        }
        return tensors, {"done": self._done, "lowest": self._lowest, "least": self._least, "stale": self._stale}

    def _go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take up a state."""
        for i, (own, best) in enumerate(zip(self.factors.tensors(), self._best.tensors(), strict=True)):
            own.copy_(tensors[f"factor{i}"])
            best.copy_(tensors[f"best{i}"])
        for i, adam in enumerate(self.adam):
            adam.steps = len(tensors["losses"])
            for name, moment in adam.moments().items():
                moment.copy_(tensors[f"{name}{i}"])
        self.random.set_state(tensors["random"])
        self.losses, self.gains = tensors["losses"].tolist(), tensors["gains"].tolist()
        self._done, self._lowest = facts["done"], facts["lowest"]
        self._least, self._stale = facts["least"], facts["stale"]

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

    def _choose(self, sizes: Tensor) -> Tensor:
        """Return the number of one group in each tile, by the sizes (tiles, groups) of its slopes."""
        if self.greedy:
            return sizes.argmax(1)
        sums = sizes.double().cumsum(1)
        drawn = torch.rand(len(sizes), 1, dtype=torch.float64, generator=self.random, device=sizes.device)
        return torch.searchsorted(sums, drawn * sums[:, -1:]).squeeze(1).clamp_max(sizes.shape[1] - 1)
