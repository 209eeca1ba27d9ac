"""Activations in a graph, however they are spelled: recognised by what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from recast.kernels.epilogue.reference import ACTIVATIONS

__all__ = ["activation_after"]

_MOST = 12  # operations of the longest spelling, GELU by powers and a hyperbolic tangent, are eight


def activation_after(value: fx.Node) -> tuple[str, fx.Node] | None:
    """Return the activation that is all what reads a value: its name, and the node with its result; None if there is none.

    Operations between the value and a node through which all of them go are evaluated on a grid of numbers, in float64, and compared
    with every activation that kernels know. ``x * sigmoid(x)`` is SiLU as much as ``silu(x)`` is.

    Examples
    --------
    >>> aten = torch.ops.aten
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> y = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.sigmoid.default, (x,))))
    >>> result = graph.output(y)
    >>> activation_after(x)[0]
    'silu'
    """
    if not any(_pointwise(reader) for reader in value.users):
        return None
    with _disable_current_modes(), torch.no_grad():
        grid = torch.linspace(-8, 8, 65, dtype=torch.float64)
        known: dict[fx.Node, Tensor] = {value: grid}
        found = None
        for _ in range(_MOST):
            node = _following(known)
            if node is None:
                return found
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
            if not isinstance(result, Tensor) or result.shape != grid.shape:
                return found
            known[node] = result
            if all(user in known for other in known if other is not node for user in other.users):
                named = _named(grid, result)
                found = found if named is None else (named, node)
    return found


def _following(known: dict[fx.Node, Tensor]) -> fx.Node | None:
    """An operation that reads nothing but known values."""
    for value in known:
        for reader in value.users:
            if reader not in known and _pointwise(reader) and all(n in known for n in reader.all_input_nodes):
                return reader
    return None


def _pointwise(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def _named(grid: Tensor, result: Tensor) -> str | None:
    matching = (
        name
        for name, (function, _) in ACTIVATIONS.items()
        if torch.allclose(function(grid), result.to(grid.dtype), rtol=1e-6, atol=1e-6)
    )
    return next(matching, None)
