"""Names of linear sites: the parameter's, with the number of the matrix where a parameter holds many."""

from __future__ import annotations

import operator

import torch
from torch import fx

from recast.patterns.sites import Use

__all__ = ["site_name"]

aten = torch.ops.aten


def site_name(use: Use, weight: str) -> str:
    """Name of the matrix of a use.

    Experts are numbered behind the component that names them, as models with a module for each expert do; other stacked
    matrices are numbered at the end.

    Examples
    --------
    >>> numbered("layers.0.mlp.experts.down_proj", [3]), numbered("heads.in", [0, 1])
    ('layers.0.mlp.experts.3.down_proj', 'heads.in.0.1')
    """
    name = weight.removesuffix(".weight") if weight != "weight" else weight
    numbers = _taken(use.weight)
    return numbered(name, numbers if use.index is None else [*numbers, use.index])


def numbered(name: str, numbers: list[int]) -> str:
    """Put the numbers of a matrix into the name of the parameter that holds it."""
    components = name.split(".")
    places = [i for i, component in enumerate(components[:-1]) if "expert" in component.lower()]
    at = places[-1] + 1 if places else len(components)
    return ".".join([*components[:at], *map(str, numbers), *components[at:]])


def _taken(node: fx.Node) -> list[int]:
    """Numbers by which a matrix is taken from a stack of them: ``w[3]``, ``w.unbind(0)[3]``."""
    numbers: list[int] = []
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        number = None
        if node.target is aten.select.int:
            number, stack = node.args[2], source
        elif node.target is operator.getitem and source.target is aten.unbind.int:
            number, stack = node.args[1], source.args[0]  # type: ignore[assignment]
        if isinstance(number, int):
            held = stack.meta.get("val")
            if held is None or held.ndim >= 3:
                numbers.insert(0, number if number >= 0 or held is None else number + held.shape[0])
        node = source
    return numbers
