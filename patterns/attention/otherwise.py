"""Attention in a form that no pattern has: told of with the reason, so that none is passed over in silence.

Nothing is made of it. A value is worth telling of where scores, a product of two computed values, are exponentiated or
normalised and enter another such product; and where keys are normalised on their own and multiplied with values first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from recast.patterns.attention.spellings import EXPONENTIALS, SOFTMAX
from recast.patterns.language import CASTS, COPIES, VIEWS, Match, Scope
from recast.patterns.linear.find import product_flops
from recast.patterns.linear.packing import size_hint
from recast.patterns.rules import Surroundings

__all__ = ["ANCHORS", "build", "worth_telling"]

ANCHORS = SOFTMAX | EXPONENTIALS
_FAR = 24  # values looked at on either side


def worth_telling(node: fx.Node, scope: Scope) -> bool:
    """Whether a value is where attention is normalised."""
    return bool(_form(node, scope))


def build(match: Match, around: Surroundings) -> str:
    """Say what stands in the way; never a site."""
    return _form(match.root, around.scope)


def _form(node: fx.Node, scope: Scope) -> str:
    scores, mixed = _reached(node, scope, up=True)
    products, mixed_after = _reached(node, scope, up=False)
    if scores and products:
        mixing = mixed or mixed_after
        if mixing is not None:
            return f"'{mixing.name}' mixes the heads of its scores, which attention as it is known here does not"
        if node.target in EXPONENTIALS:
            return (
                f"its scores are exponentiated ('{node.name}'), but what enters the product with the values is not "
                "exp / sum(exp) over the last dimension: no softmax"
            )
        return ""
    if node.target in SOFTMAX and not scores and any(_alone(node, p, scope) for p in products):
        return (
            f"keys are normalised on their own ('{node.name}') and multiplied with values before queries are (linear "
            "attention): there are no scores of queries with keys"
        )
    return ""


def _alone(node: fx.Node, product: fx.Node, scope: Scope) -> bool:
    """Whether a normalised value is an operand of a product, itself an operand of another product of computed values."""
    return any(_laid_out(n) is node for n in product.all_input_nodes) and bool(_reached(product, scope, up=False)[0])


def _laid_out(node: fx.Node) -> fx.Node:
    """What a value is a view, cast or copy of."""
    at: Any = node
    while at.target in VIEWS | CASTS | COPIES:
        at = at.args[0]
    return at  # type: ignore[no-any-return]


def _reached(node: fx.Node, scope: Scope, *, up: bool) -> tuple[list[fx.Node], fx.Node | None]:
    """Products of two computed values on one side, and the product with a weight passed on the way that mixes their heads."""
    seen, queue = {node}, [node]
    found: list[fx.Node] = []
    mixes: list[fx.Node] = []
    while queue and len(seen) < _FAR:
        at = queue.pop(0)
        for other in at.all_input_nodes if up else list(at.users):
            value: Any = other.meta.get("val")
            if other in seen or other.op != "call_function" or not isinstance(value, Tensor | tuple | list):
                continue
            if other in scope.constants:
                continue
            seen.add(other)
            if not product_flops(other):
                queue.append(other)
            elif _computed(other, scope) > 1:
                found.append(other)
            else:
                mixes.append(other)
    if found:
        return found, None
    for linear in mixes:
        beyond = _views(linear, scope, up=up)
        if beyond is not None and _over_heads(linear, beyond if up else node, scope):
            return [beyond], linear
    return [], None


def _views(linear: fx.Node, scope: Scope, *, up: bool) -> fx.Node | None:
    """The product of computed values beyond a linear, if only views, casts, copies and single steps with numbers stand between."""
    at: Any = linear
    for _ in range(_FAR):
        inputs = [n for n in at.all_input_nodes if n not in scope.constants]
        nexts = inputs if up else list(at.users)
        if len(nexts) != 1 or nexts[0].op != "call_function" or not isinstance(nexts[0].meta.get("val"), Tensor):
            return None
        at = nexts[0]
        if product_flops(at):
            return at if _computed(at, scope) > 1 else None
    return None


def _over_heads(linear: fx.Node, scores: fx.Node, scope: Scope) -> bool:
    """Whether a weight sums over a size that is none of the last two of the scores: over heads."""
    sizes = {size_hint(s) for s in scores.meta["val"].shape[:-2]}
    weights = [n for n in linear.all_input_nodes if n in scope.constants]
    return bool(weights) and max(weights, key=lambda n: n.meta["val"].ndim).meta["val"].shape[-1] in sizes


def _computed(node: fx.Node, scope: Scope) -> int:
    return len([n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and n not in scope.constants])
