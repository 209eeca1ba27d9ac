"""Remove what nobody reads."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["has_effect", "remove_dead"]


def remove_dead(graph: fx.Graph) -> None:
    """Remove values that nothing reads, unless computing them has an effect.

    Attention and dropout count as random in torch, and random operations as effects, whatever their probability: an attention
    that was replaced would be computed for nothing. A random number that nobody reads may go as well.
    """
    graph.eliminate_dead_code(is_impure_node=has_effect)


def has_effect(node: fx.Node) -> bool:
    """Whether computing a value does more than give it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        return bool(target._schema.is_mutable)
    return bool(node.is_impure()) or (node.op == "call_function" and "_assert" in str(target))
