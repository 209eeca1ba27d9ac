"""Compute once what is computed twice."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from recast.passes.exact import Edit, ExactPass

__all__ = ["CommonSubexpressions"]


@dataclasses.dataclass(frozen=True)
class CommonSubexpressions(ExactPass):
    """``f(x), f(x)  ->  y = f(x); y, y`` for operations without effects and without chance."""

    name: ClassVar[str] = "common_subexpressions"

    def apply(self, edit: Edit) -> None:
        """Walk the graph once; what is replaced makes later values equal in turn."""
        results = set(edit.graph.find_nodes(op="output")[0].all_input_nodes)
        seen: dict[Any, fx.Node] = {}
        for node in edit.graph.nodes:
            if node.op != "call_function" or not _repeatable(node):
                continue
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
            if first is node:
                continue
            if node in results:
                edit.refuse(node.name, f"it is a result; given as '{first.name}' too, the two would share memory", node)
                continue
            edit.replace(node, first)
            edit.did(f"{node.name} = {first.name}")


def _repeatable(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        chance = torch.Tag.nondeterministic_seeded in target.tags or target._opname.startswith(("empty", "new_empty"))
        return not target._schema.is_mutable and not chance and bool(target._schema.returns)
    return getattr(target, "__module__", "") in ("_operator", "math") or getattr(target, "__name__", "").startswith(
        "sym_"
    )


def _frozen(value: Any) -> Any:
    """A hashable stand-in that tells 1, 1.0 and True apart; a weight is known by name."""
    if isinstance(value, fx.Node):
        return ("weight", value.target) if value.op == "get_attr" else value
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return (type(value).__name__, str(value))
