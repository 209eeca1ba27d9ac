"""Drift of layers: how far each layer of a chain moves the distribution that the model's head would give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.layers import layers_in_a_row
from recast.patterns.errors import CalibrationError
from recast.patterns.program import Program, fixed_size
from recast.patterns.sites import LinearSite

__all__ = ["LayerDrift", "divergence"]


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Kullback-Leibler divergence ``Σ p log(p / q)`` in nats of the softmax q of `after` from the softmax p of `before`.

    Parameters
    ----------
    before, after
        Logits, classes along the last dimension; computed with in float64.

    Examples
    --------
    >>> divergence(torch.tensor([0.0, 0.0]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).log_softmax(-1))
    tensor([0.0000, 0.1201], dtype=torch.float64)
    """
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    found: Tensor = (p.exp() * (p - q)).sum(-1)
    return found


class LayerDrift:
    """Gathers, batch by batch, how far each numbered layer's output distribution is from the next one's.

    What a layer gives is averaged over the tokens of a batch and put through the part of the program that follows the last
    layer (final norm, head); the Kullback-Leibler divergences of consecutive softmaxes are averaged over batches.

    Parameters
    ----------
    program
        As captured: module names tell which layer a value belongs to.
    sites
        Its linear sites; one of them must give the logits.

    Raises
    ------
    CalibrationError
        There is no chain of numbered layers, or what follows it does not end in logits.

    Notes
    -----
    After MASA, which groups layers so. A projection to an embedding looks like a head in a graph; for such a model the
    softmax is over features, and whether that means anything is the caller's to know.
    """

    def __init__(self, program: Program, sites: Sequence[LinearSite]) -> None:
        self.program = program
        self.chain = layers_in_a_row(program, sites)
        self.names = self.chain.names
        self.totals = [0.0] * (len(self.names) - 1)
        self.batches = 0
        self._means: dict[fx.Node, Tensor] = {}
        self._given: dict[fx.Node, Any] = {}
        self._shape: torch.Size = torch.Size()
        self._wanted = {*self.chain.outputs, *self.chain.given}

    def see(self, node: fx.Node, value: Any) -> None:
        """Take in a value as the program computes it."""
        if node not in self._wanted:
            return
        if node in self.chain.given:
            self._given[node] = value
            return
        self._shape = value.shape
        self._means[node] = value.detach().double().flatten(0, -2).mean(0).to(value.dtype)

    def add(self) -> None:
        """Count the batch whose values were seen."""
        with torch.no_grad():
            logits = (self._logits(self._means[node]) for node in self.chain.outputs)
            found = [float(divergence(p, q).mean()) for p, q in pairwise(logits)]
        for name, value in zip(self.names, found, strict=False):
            if not value < float("inf"):
                raise CalibrationError(
                    f"calibration: the drift after {name} is not finite in this batch; check the batch, or calibrate in float32"
                )
        self.totals = [total + value for total, value in zip(self.totals, found, strict=True)]
        self.batches += 1
        self._means, self._given = {}, {}

    def means(self) -> dict[str, float]:
        """Return the mean divergence of each layer but the last, by the layer's name."""
        return {name: total / self.batches for name, total in zip(self.names, self.totals, strict=False)}

    def _logits(self, mean: Tensor) -> Tensor:
        # Every token is the same, so that one stands for all where the program takes any number of them.
        last = self.chain.outputs[-1]
        sizes = [fixed_size(size) for size in last.meta["val"].shape]
        shape = [1 if size is None else size for size in sizes] if self.chain.one_is_enough else self._shape
        head = fx.Interpreter(self.program.module, garbage_collect_values=False)
        head.env = {**self._given, last: mean.expand(shape).contiguous()}
        for node in self.chain.head:
            head.env[node] = head.run_node(node)
        found: Tensor = head.env[self.chain.logits]
        return found.flatten(0, -2)
