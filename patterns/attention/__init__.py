"""Attention in every spelling, with the linears around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from recast.patterns.attention import otherwise, pieces
from recast.patterns.attention.dialect import emit
from recast.patterns.attention.site import build
from recast.patterns.attention.spellings import NORMALISERS, SDPA, SOFTMAX, fused, reduces_last, written_out
from recast.patterns.language import Call
from recast.patterns.linear.find import product_flops
from recast.patterns.rules import Rule, Surroundings, never

__all__ = ["RULES"]


def _between_products(node: fx.Node, around: Surroundings) -> bool:
    """Whether a softmax looks like attention's: made from a product of activations, its result multiplied again."""
    if node.target in SDPA:
        return True
    if node.target not in SOFTMAX:
        return False  # a sigmoid alone says nothing
    return _near(node, around, up=True) and _near(node, around, up=False)


def _near(node: fx.Node, around: Surroundings, *, up: bool, limit: int = 24) -> bool:
    seen, queue = {node}, [node]
    while queue and len(seen) < limit:
        at = queue.pop(0)
        for other in at.all_input_nodes if up else list(at.users):
            value: Any = other.meta.get("val")
            if other in seen or other.op != "call_function" or not isinstance(value, Tensor | tuple | list):
                continue
            if product_flops(other):
                if not around.products(other):
                    return True
                continue
            seen.add(other)
            queue.append(other)
    return False


RULES = (
    Rule("attention", "attention", fused(), build, SDPA, _between_products, order=30, emit=emit),
    Rule(
        "attention_written_out", "attention", written_out(), build, NORMALISERS, _between_products, order=31, emit=emit
    ),
    Rule(
        "attention_in_pieces",
        "attention",
        Call.of(SOFTMAX, where=reduces_last),
        pieces.build,
        suspicious=never,
        order=32,
    ),
    Rule(
        "attention_otherwise",
        "attention",
        Call.of(otherwise.ANCHORS, where=otherwise.worth_telling),
        otherwise.build,
        otherwise.ANCHORS,
        lambda node, around: otherwise.worth_telling(node, around.scope),
        order=33,
    ),
)
