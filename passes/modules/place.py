"""Where the matrix of a linear lies in the parameter that holds it, most often with those of other experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.modules.flow import Refused
from recast.patterns.linear.find import as_matrix
from recast.patterns.sites import LinearSite, Use

__all__ = ["UNMOVED", "Numbers", "Place", "chain_of", "is_released", "place_of"]

aten = torch.ops.aten

_SAME = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten._to_copy.default, aten.to.dtype,
}  # fmt: skip
_TURNS = {aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.unsqueeze.default}
_TAKES = {aten.select.int, aten.unbind.int}
UNMOVED = _SAME | {aten.unsqueeze.default}


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in the parameter that holds it.

    Parameters
    ----------
    weight
        Name of the parameter.
    fixed
        Axes that number matrices, and which one it is.
    rows, columns
        The axes of the matrix.

    Examples
    --------
    >>> Place("w", ((0, 1),), 2, 1).of(torch.arange(12).view(2, 3, 2)).tolist()
    [[6, 8, 10], [7, 9, 11]]
    """

    weight: str
    fixed: tuple[tuple[int, int], ...]
    rows: int
    columns: int

    def of(self, held: Tensor) -> Tensor:
        """The matrix as a view of the parameter."""
        for axis, index in sorted(self.fixed, reverse=True):
            held = held.select(axis, index)
        return held if self.rows < self.columns else held.T

    def sizes(self, whole: Sequence[int], matrix: Tensor) -> list[int]:
        """Sizes of the parameter if its matrices had the shape of another one."""
        sizes = list(whole)
        sizes[self.rows], sizes[self.columns] = matrix.shape
        return sizes


@dataclass(frozen=True)
class Numbers:
    """A parameter with a number for each hidden feature of each expert: a bias.

    Parameters
    ----------
    weight
        Its name; (experts, features).
    experts
        Its row for each expert.
    labels
        Of a row's numbers.
    nodes
        What stands between it and where it is applied.
    """

    weight: str
    experts: tuple[int, ...]
    labels: Tensor
    nodes: tuple[fx.Node, ...]


def place_of(site: LinearSite, use: Use, weights: Mapping[str, Tensor]) -> Place:
    """Where the matrix of a use lies; Refused if that cannot be told."""
    if use.addend is not None:
        raise Refused(f"'{site.name}' cannot be made anew: the product adds '{use.addend.name}', which is computed")
    source, *chain = chain_of(use.weight)
    name = str(source.target)
    whole = weights[name].shape
    rows: list[int] = []
    columns: list[int] = []
    fixed: list[tuple[int, int]] = []
    for axis, size in enumerate(whole):
        numbers = torch.arange(size).view([-1 if i == axis else 1 for i in range(len(whole))])
        value: Any = numbers.expand(whole)  # which takes no memory, nor do the steps
        for node in chain:
            target: Any = node.target
            value = value if target in _SAME else target(value, *node.args[1:], **node.kwargs)
        matrix = as_matrix(value, use)
        for found, line in ((rows, matrix[:, 0]), (columns, matrix[0])):
            if len(line) > 1 and torch.equal(line, torch.arange(size)):
                found.append(axis)
        if axis not in rows and axis not in columns:
            fixed.append((axis, int(matrix[0, 0])))
    if len(rows) != 1 or len(columns) != 1 or rows == columns:
        raise Refused(f"the matrix of '{site.name}' does not lie along two dimensions of '{name}'")
    return Place(name, tuple(fixed), rows[0], columns[0])


def chain_of(node: Any) -> list[fx.Node]:
    """The value of a parameter and what stands between it and its product, none of which names its sizes."""
    found: list[fx.Node] = []
    while node.op == "call_function":
        taken = node.target in _TAKES or getattr(node.target, "__name__", "") == "getitem"
        if node.target not in _SAME | _TURNS and not taken:
            kind = getattr(node.target, "_opname", node.target)
            raise Refused(f"its matrices come from '{node.name}' ({kind}), which is not followed")
        found.append(node)
        node = node.args[0]
    return [node, *reversed(found)]


def is_released(weight: Tensor) -> bool:
    """Whether the memory of a weight was given back."""
    return weight.untyped_storage().nbytes() == 0 and weight.numel() > 0
