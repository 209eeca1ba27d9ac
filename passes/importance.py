"""Importances of rows and columns of weights: their empirical Fisher information under a loss of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from recast.passes.forms.stats import all_finite
from recast.patterns.errors import CalibrationError
from recast.patterns.linear.find import as_matrix
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite, Use

__all__ = ["Importances", "Loss"]

# A scalar from what the model gives and the batch it was given.
Loss = Callable[[Any, Any], Tensor]


class Importances:
    """Sums up squared gradients of every site's matrix, batch by batch, and keeps their sums over columns and rows.

    Parameters
    ----------
    program
        As captured; its weights are neither changed nor given gradients.
    sites
        What to gather for; parts of packed weights have importances of their own.
    loss
        Called with the model's output and the batch.
    """

    def __init__(self, program: Program, sites: list[LinearSite], loss: Loss) -> None:
        self.program, self.sites, self.loss = program, sites, loss
        self.totals: dict[str, tuple[Tensor, Tensor]] = {}
        self.batches = 0

    def add(self, leaves: list[Any], batch: Any) -> None:
        """Take in one batch; `leaves` are the program's flat inputs."""
        weights = {use.weight for site in self.sites for use in site.uses}
        with torch.enable_grad():
            run = _WithGradients(self.program, weights)
            results = self.program.outputs(list(run.run(*leaves)))
            value = self.loss(pytree.tree_unflatten(results, self.program.interface.out_spec), batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise CalibrationError(
                    f"calibration: the loss gave {_described(value)}; a scalar tensor computed from the model's output "
                    "would work, such as lambda output, batch: output.logsumexp(-1).mean()"
                )
            nodes = list(run.held)
            found = torch.autograd.grad(value.reshape(()), [run.held[node] for node in nodes], allow_unused=True)
        gradients = dict(zip(nodes, found, strict=True))
        for site in self.sites:
            whole = _gradient(site.uses, gradients)
            if whole is None:
                continue
            self._add(site.name, whole)
            for part in site.parts:
                self._add(f"{site.name}.{part.name}", torch.cat([whole[start:stop] for start, stop in part.rows]))
        self.batches += 1

    def _add(self, name: str, gradient: Tensor) -> None:
        if not all_finite(gradient):
            raise CalibrationError(
                f"calibration: the gradient of the loss at {name} is not finite in this batch; check the loss, "
                "or calibrate in float32"
            )
        square = gradient.double().square().cpu()
        rows, columns = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = (rows + square.sum(1), columns + square.sum(0))

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return importances of rows and columns, means over batches, by name of site or part."""
        return {name: (rows / self.batches, columns / self.batches) for name, (rows, columns) in self.totals.items()}


class _WithGradients(fx.Interpreter):
    """Runs the program with every wanted weight a leaf of its own."""

    def __init__(self, program: Program, wanted: set[fx.Node]) -> None:
        super().__init__(program.module)
        self.wanted = wanted
        self.held: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor) and value.is_floating_point():
            value = self.held[n] = value.detach().requires_grad_()
        return value


def _gradient(uses: Iterable[Use], gradients: Mapping[fx.Node, Tensor | None]) -> Tensor | None:
    """Gradient (m, n) of a site's matrix: of a weight read at several nodes, the sum."""
    total = None
    seen = set()
    for use in uses:
        gradient = gradients.get(use.weight)
        if gradient is None or (use.weight, use.index) in seen:
            continue
        seen.add((use.weight, use.index))  # one node that several products read has all of their gradient already
        matrix = as_matrix(gradient, use)
        total = matrix if total is None else total + matrix
    return total


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {tuple(value.shape)}" + ("" if value.requires_grad else " that does not depend on the weights")
