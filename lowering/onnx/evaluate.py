"""What a node of a program computes, on values of our own choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.program import get_by_path

__all__ = ["Unknown", "evaluate"]

_MOST = 2000  # nodes


class Unknown(Exception):
    """A value needs more than was given, or cannot be computed."""


def evaluate(node: fx.Node, given: Mapping[fx.Node, Tensor], resized: Sequence[Sequence[Any]] = ()) -> Tensor:
    """Compute a node from values of others, with whatever sizes these have.

    Parameters
    ----------
    node
        Of a graph of ATen operations.
    given
        Values of some nodes; what is made from anything else but weights is unknown.
    resized
        Two shapes of one value, in the graph and here: sizes of the first are replaced by those of the second wherever they occur.

    Raises
    ------
    Unknown
        It needs another input, or does not run.
    """
    known: dict[fx.Node, Any] = dict(given)
    sizes = dict(zip(map(_expression, resized[0]), resized[1], strict=True)) if resized else {}
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        here, ready = stack.pop()
        if ready:
            order.append(here)
        elif here not in seen and here not in known:
            seen.add(here)
            held = here.meta.get("val")
            if isinstance(held, torch.SymInt) and _expression(held) in sizes:
                known[here] = sizes[_expression(held)]
                continue
            stack.append((here, True))
            stack += [(n, False) for n in here.all_input_nodes]
            if len(seen) > _MOST:
                raise Unknown(f"'{node.name}' is made of too much to be computed apart")
    with torch.no_grad():
        for here in order:
            known[here] = _run(here, known)
    found: Tensor = known[node]
    return found


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _run(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return get_by_path(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
    if node.op != "call_function":
        raise Unknown(f"it depends on '{node.name}'")
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # whatever an operation raises for sizes it was not traced with
        raise Unknown(f"'{node.name}' does not run on an example: {error}") from error
