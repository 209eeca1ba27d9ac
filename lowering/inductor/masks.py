"""What of a mask of attention depends on nothing: models that mask padding alone still ask whether each query's number is 0 or more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["essence"]

aten = torch.ops.aten
_SAME_VALUES = {
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.slice.Tensor,
    aten.alias.default, aten.clone.default,
}  # fmt: skip
_BOTH = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_AT_LEAST = {aten.ge.Scalar: 0, aten.gt.Scalar: 1}


def essence(mask: fx.Node) -> fx.Node:
    """Return what a bool mask says, without what is always true and without being spread: it broadcasts to the mask's shape.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> padding = graph.placeholder("padding")
    >>> padding.meta["val"] = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    >>> rows = graph.call_function(aten.arange.default, (5,))
    >>> always = graph.call_function(aten.ge.Scalar, (graph.call_function(aten.unsqueeze.default, (rows, 1)), 0))
    >>> both = graph.call_function(aten.bitwise_and.Tensor, (always, padding))
    >>> essence(graph.call_function(aten.expand.default, (both, [2, 1, 5, 5])))
    padding
    """
    while True:
        if mask.target is aten.expand.default and isinstance(mask.args[0], fx.Node):
            mask = mask.args[0]
        elif mask.target in _BOTH and any(_always(side) for side in mask.args[:2]):
            left, right = mask.args[:2]
            other = right if _always(left) else left
            if not isinstance(other, fx.Node) or not _is_bool(other):
                return mask
            mask = other
        else:
            return mask


def _is_bool(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _always(node: Any) -> bool:
    """Whether all values are known to be true."""
    if not isinstance(node, fx.Node):
        return node is True
    if node.target in _SAME_VALUES:
        return _always(node.args[0])
    if node.target in _BOTH:
        return all(_always(side) for side in node.args[:2])
    if node.target in _ONES:
        return True
    if node.target in _AT_LEAST and isinstance(node.args[1], int):
        return _least(node.args[0]) >= node.args[1] + _AT_LEAST[node.target]
    return False


def _least(node: Any) -> float:
    """A number that no value is below."""
    if isinstance(node, bool) or not isinstance(node, fx.Node):
        return node if isinstance(node, int) and not isinstance(node, bool) else -torch.inf
    if node.target in _SAME_VALUES:
        return _least(node.args[0])
    if node.target is aten.arange.default:
        return 0
    if node.target is aten.arange.start and isinstance(node.args[0], int):
        return node.args[0]
    if node.target is aten.add.Tensor and not node.kwargs:
        return _least(node.args[0]) + _least(node.args[1])
    return -torch.inf
