"""Products as contractions: one description for `linear`, `addmm`, `matmul` from either side, `einsum`, 1x1 convolution."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx
from torch.fx.node import Target

__all__ = ["Contraction"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Contraction:
    """``y[...] = sum x[...] w[...]`` with one letter a dimension, as in `einsum`.

    Parameters
    ----------
    x, w, y
        Letters of the activation, the weight and the result.
    stack
        Letters of the weight that number matrices although the activation lacks them: every matrix meets all of it.

    Examples
    --------
    >>> c = Contraction("bti", "io", "bto")
    >>> c.inputs, c.outputs, c.batch, c.reason()
    ('i', 'o', '', None)
    >>> Contraction("ti", "eio", "teo").outputs, Contraction("ti", "eio", "teo", stack="e").outputs
    ('eo', 'o')
    """

    x: str
    w: str
    y: str
    stack: str = ""

    @property
    def inputs(self) -> str:
        """Letters summed over, in the weight's order."""
        return "".join(d for d in self.w if d in self.x and d not in self.y)

    @property
    def outputs(self) -> str:
        """Letters that only the weight brings, in the result's order."""
        return "".join(d for d in self.y if d in self.w and d not in self.x and d not in self.stack)

    @property
    def paired(self) -> str:
        """Letters that pair a matrix of the weight with a slice of the activation."""
        return "".join(d for d in self.w if d in self.x and d in self.y)

    @property
    def batch(self) -> str:
        """Letters that number matrices of the weight."""
        return self.paired or self.stack

    @property
    def free(self) -> str:
        """Letters of the activation that pass through, in the result's order."""
        return "".join(d for d in self.y if d in self.x and d not in self.w)

    def reason(self) -> str | None:
        """Why this is not a product of activations with constant matrices; None if it is."""
        for name, letters in (("activation", self.x), ("weight", self.w), ("result", self.y)):
            if len(set(letters)) != len(letters):
                return f"a dimension of the {name} is repeated (a diagonal, not a matrix product)"
        if lost := [d for d in self.w if d not in self.x and d not in self.y]:
            return f"the weight is summed over its own dimension(s) {''.join(lost)}"
        if lost := [d for d in self.x if d not in self.w and d not in self.y]:
            return f"the activation is summed over its own dimension(s) {''.join(lost)}"
        if not self.inputs:
            return "nothing is summed over: an elementwise or outer product"
        if not self.outputs:
            return "the weight is a vector along the summed dimension, not a matrix"
        return None

    def matrix_order(self) -> list[int]:
        """Permutation that brings the weight to ``batch, outputs, inputs``."""
        return [self.w.index(d) for d in self.batch + self.outputs + self.inputs]

    def arrange(self, x: Tensor, index: int | None = None) -> Tensor:
        """The activation as ``(free..., in_features)``, for a batched weight the slice that meets matrix `index`."""
        letters = self.paired + self.free + self.inputs
        x = x.permute([self.x.index(d) for d in letters])
        if self.paired:
            x = x.flatten(0, len(self.paired) - 1)[index or 0]
        return x.flatten(len(self.free))

    def emit_input(self, graph: fx.Graph, x: fx.Node, batch: str = "") -> fx.Node:
        """Insert what turns the activation into ``(free..., in_features)``; `batch` letters were selected away before."""
        letters = "".join(d for d in self.x if d not in batch)
        order = [letters.index(d) for d in self.free + self.inputs]
        if order != sorted(order):
            x = _call(graph, aten.permute.default, x, order)
        if len(self.inputs) > 1:
            x = _call(graph, aten.flatten.using_ints, x, len(self.free), -1)
        return x

    def emit_output(self, graph: fx.Graph, y: fx.Node, sizes: dict[str, int], batch: str = "") -> fx.Node:
        """Insert what turns ``(free..., out_features)`` into the result without its batch letters."""
        if len(self.outputs) > 1:
            y = _call(graph, aten.unflatten.int, y, -1, [sizes[d] for d in self.outputs])
        have = self.free + self.outputs
        order = [have.index(d) for d in self.y if d not in batch]
        return y if order == sorted(order) else _call(graph, aten.permute.default, y, order)


def _call(graph: fx.Graph, target: Target, *args: object) -> fx.Node:
    return graph.call_function(target, args)  # type: ignore[arg-type]
