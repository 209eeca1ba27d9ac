"""What the searches of ARMOR share: the factors, exact updates of pairs, steps that can be interrupted."""

from __future__ import annotations

import abc
import hashlib
import itertools
import time
from dataclasses import dataclass
from typing import Any, ClassVar

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
# Of a loss that small nothing is left to gain.
_ATOL = 1e-8
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
    h, k, now = linear.double(), quadratic.double(), current.double()
    s = size.double().unsqueeze(1)
    first, second = torch.tensor(PAIRS, device=h.device).T
    a, b, d = k[:, first, first], k[:, first, second], k[:, second, second]  # of each pair, (t, 6)
    at, beside = h[:, first], h[:, second]
    scale = s * ((a + _RIDGE) * (d + _RIDGE) - b * b)
    safe = torch.where(scale > 0, scale, torch.inf)
    one, other = (b * beside - (d + _RIDGE) * at) / safe, (b * at - (a + _RIDGE) * beside) / safe
    change = 2 * (at * one + beside * other) + s * (a * one * one + 2 * b * one * other + d * other * other)
    # Of a last group with fewer than two inputs any pair will do that holds what there is.
    missing = ~(allowed[:, first] & allowed[:, second]) & (allowed.sum(1, keepdim=True) >= 2)
    least, which = change.masked_fill_(missing, torch.inf).min(1)
    before = 2 * (h * now).sum(1) + size.double() * ((k * now.unsqueeze(1)).sum(2) * now).sum(1)
    better = least < before
    rows = torch.arange(len(h), device=h.device)
    values = torch.zeros_like(h)
    values[rows, first[which]], values[rows, second[which]] = one[rows, which], other[rows, which]
    pairs = torch.zeros_like(values, dtype=torch.bool)
    pairs[rows, first[which]] = pairs[rows, second[which]] = True
    found = torch.where(better.unsqueeze(1), values, now)
    return found.to(current.dtype), pairs, torch.where(better, before - least, 0)


class ArmorSearch(abc.ABC):
    """Lower ``Σ_ij w_j (W̄ - A C B)²_ij`` from given factors, step by step.

    Parameters
    ----------
    target
        W̄ (rows, columns), both multiples of d; rows and columns past the weight's own are zero.
    weights
        w (columns,), zero for columns that are no inputs.
    factors
        Where to begin; may be changed in place.
    features
        How many of the columns are inputs.
    rate
        Step size, where steps have one.
    greedy
        Take the group of the largest gradient in each tile in place of one drawn with its size as probability.
    seed
        Of what is drawn.

    Attributes
    ----------
    losses, gains
        Of each step: the loss at its beginning, and by how much its updates of pairs lowered it, never negative.
    """

    # The search ends when so many steps have not lowered the best loss by this share.
    patience: ClassVar[int]
    rtol: ClassVar[float]

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
        self.target, self.weights = target, weights
        self.rate, self.greedy = rate, greedy
        self.random = torch.Generator(device=target.device).manual_seed(seed)
        self.block = factors.left.shape[-1]
        self.tiles = (len(factors.left), len(factors.right))
        self.inputs = torch.arange(target.shape[1], device=target.device) < features
        self.losses: list[float] = []
        self.gains: list[float] = []
        self._least, self._stale, self._done = float("inf"), 0, 0

    @abc.abstractmethod
    def loss(self) -> float:
        """Return the objective at the factors as they are."""

    @abc.abstractmethod
    def found(self) -> ArmorFactors:
        """Return the best factors seen, the first included."""

    @abc.abstractmethod
    def _step(self) -> float:
        """Improve the factors; return the loss at the beginning."""

    @abc.abstractmethod
    def _held(self) -> dict[str, Tensor]:
        """Everything that the next step rests on and that is not drawn; a state is copied into these."""

    def run(self, iterations: int, progress: bool | None = None) -> ArmorFactors:
        """Take so many steps, or fewer where they stop helping, and return the best factors seen, the first included.

        Inside a fit whose states are kept (`recast.passes.unfinished`), the search goes on where it was interrupted, and
        gives what it would have given without.
        """
        kept, name = unfinished(), self._name(iterations)
        if kept is not None and (state := kept.load(name)) is not None:
            self._go_on(*state)
        begun = saved = time.monotonic()
        for step in track(range(self._done, iterations), "armor", progress):
            if kept is not None and time.monotonic() - saved > SAVE_EVERY:
                kept.save(name, *self._state())
                saved = time.monotonic()
            self.advance()
            self._done = step + 1
            if self.ended:
                self._done = iterations
                break
        if kept is not None and time.monotonic() - begun > SAVE_EVERY:
            kept.save(name, *self._state())  # the fit may hold another search, which may be interrupted
        return self.found()

    def advance(self) -> float:
        """Take one step; returns the loss at its beginning, which `losses` then ends with."""
        loss = self._step()
        self.losses.append(loss)
        self._stale = 0 if loss < self._least * (1 - self.rtol) - _ATOL else self._stale + 1
        self._least = min(self._least, loss)
        return loss

    @property
    def ended(self) -> bool:
        """Whether the last steps, as many as `patience` says, brought nothing."""
        return self._stale >= self.patience

    def _name(self, iterations: int) -> str:
        """What the search is of: its beginning and its settings."""
        begin = [tensor_digest(t) for t in (self.target, self.weights, *self._held().values())]
        settings = (type(self).__name__, iterations, self.rate, self.greedy, self.random.initial_seed())
        return hashlib.sha256("\n".join([*begin, repr(settings)]).encode()).hexdigest()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step rests on, and what was found so far."""
        tensors = {
            **self._held(),
            "random": self.random.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "gains": torch.tensor(self.gains, dtype=torch.float64),
        }
        return tensors, {"done": self._done, "least": self._least, "stale": self._stale}

    def _go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take up a state."""
        for name, held in self._held().items():
            held.copy_(tensors[name])
        self.random.set_state(tensors["random"])
        self.losses, self.gains = tensors["losses"].tolist(), tensors["gains"].tolist()
        self._done, self._least, self._stale = facts["done"], facts["least"], facts["stale"]

    def _choose(self, sizes: Tensor) -> Tensor:
        """Return the number of one group in each tile, by the sizes (tiles, groups) of its slopes."""
        if self.greedy:
            return sizes.argmax(1)
        sums = sizes.double().cumsum(1)
        drawn = torch.rand(len(sizes), 1, dtype=torch.float64, generator=self.random, device=sizes.device)
        return torch.searchsorted(sums, drawn * sums[:, -1:]).squeeze(1).clamp_max(sizes.shape[1] - 1)
