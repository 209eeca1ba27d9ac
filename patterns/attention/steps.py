"""What happens to the scores between the product and the normaliser, read in order: scale, soft cap, masks, sinks."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from recast.patterns.language import CASTS, COPIES, VIEWS, Match, Scope, literal

__all__ = ["Steps", "read_steps"]

aten = torch.ops.aten


@dataclasses.dataclass
class Steps:
    """The steps in the canonical order ``sinks(mask(softcap(scale q k)))``, or why they are in another.

    Parameters
    ----------
    scale
        Product of the factors.
    softcap
        0 if there is none.
    masks
        ``(kind, mask, fill)`` in order, kind being ``add`` (fill unused), ``keep`` (a boolean that says what stays) or ``drop``.
    sinks
        Column of logits joined at the end.
    dtype
        In which the normaliser computes, if another.
    reason
        Why the steps are in no canonical order; empty if they are.
    """

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
    sinks: fx.Node | None = None
    dtype: torch.dtype | None = None
    reason: str = ""


def read_steps(match: Match, scope: Scope) -> Steps:
    """Follow the scores from the product to the normaliser."""
    steps, inside = Steps(), set(match.nodes)
    node, ended = match["scores"], match["normaliser"]
    while node is not ended and not steps.reason:
        readers = [u for u in node.users if u in inside]
        if not readers:
            steps.reason = f"'{node.name}' is read by nothing that matched"
            break
        # The largest score is read twice: by what finds it and by what takes it off.
        user = next((u for u in readers if u.target is aten.sub.Tensor), readers[0])
        if user is not ended:
            _read(user, node, steps, scope)
        node = user
    _finish(match, steps, scope)
    steps.reason = steps.reason or _behind(match, steps)
    return steps


def _read(user: fx.Node, before: fx.Node, steps: Steps, scope: Scope) -> None:
    operands, target = scope.arguments(user), user.target
    name = str(getattr(target, "_opname", target))
    if target in COPIES or (target in VIEWS and user.meta["val"].shape == before.meta["val"].shape):
        return
    if target in CASTS:
        steps.dtype = user.meta["val"].dtype
        return
    if target in VIEWS:
        steps.reason = f"'{user.name}' changes the shape of the scores"
        return
    other = next((o for o in operands[:2] if o is not before), None)
    number = literal(other, scope)
    if name in ("mul", "div") and isinstance(number, int | float) and (name == "mul" or operands[0] is before):
        factor = float(number) if name == "mul" else 1 / float(number)
        if steps.masks:
            steps.reason = f"'{user.name}' scales the scores after they were masked"
        elif steps.softcap < 0:  # after tanh: the cap itself
            cap, steps.softcap = factor, -steps.softcap
            if abs(cap - steps.softcap) > 1e-6 * cap:
                steps.reason = f"'{user.name}' scales the capped scores by {cap:g}, the cap is {steps.softcap:g}"
        else:
            steps.scale *= factor
    elif name == "tanh":
        steps.softcap, steps.scale = (
            -1 / _last_factor(user, before, scope),
            steps.scale / _last_factor(user, before, scope),
        )
    elif name == "add" and isinstance(other, fx.Node) and scope.named(user).get("alpha", 1) == 1:
        steps.masks.append(("add", other, None))
    elif name == "masked_fill":
        _fill(steps, "drop", operands[1], operands[2], scope)
    elif name == "where":
        keeps = operands[1] is before
        _fill(steps, "keep" if keeps else "drop", operands[0], operands[2 if keeps else 1], scope)
    elif name == "cat":
        steps.sinks = next(o for o in operands[0] if o is not before)
    elif name == "sub" and operands[0] is before and _is_maximum(other, before, scope):
        return  # changes nothing behind a softmax
    else:
        steps.reason = f"'{user.name}' ({name}) is no step that has a canonical place"


def _is_maximum(value: Any, scores: fx.Node, scope: Scope) -> bool:
    """Whether a value is the largest score of each row."""
    while isinstance(value, fx.Node) and (value.target in COPIES or value.target is operator.getitem):
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.target not in (aten.amax.default, aten.max.dim):
        return False
    named = scope.named(value)
    dimension = named["dim"]
    last = {-1, scores.meta["val"].ndim - 1}
    return value.args[0] is scores and (dimension in last if isinstance(dimension, int) else set(dimension) <= last)


def _fill(steps: Steps, kind: str, mask: Any, value: Any, scope: Scope) -> None:
    number = literal(value, scope)
    if not isinstance(number, int | float):
        steps.reason = f"a mask fills in '{value}', which is computed"
    steps.masks.append((kind, mask, number))


def _last_factor(tanh: fx.Node, before: fx.Node, scope: Scope) -> float:
    """The factor taken just before a soft cap's tanh: one over the cap."""
    operands = scope.arguments(before)
    number = next((n for o in operands[:2] if isinstance(n := literal(o, scope), int | float)), 1.0)
    return float(number) if "mul" in str(before.target) else 1 / float(number)


def _behind(match: Match, steps: Steps) -> str:
    """Why what happens behind the normaliser has no canonical place; empty if it has."""
    product, scores = match["product"], match["scores"]
    if aten.einsum.default in (product.target, scores.target):
        return "its products are written as einsum"
    if product.args[1] is not match["value"]:
        return "the values are the left operand"
    node = product.args[0]
    while node is not match["normaliser"]:
        name = str(getattr(node.target, "_opname", node.target))
        same = node.target in VIEWS and node.meta["val"].shape == node.args[0].meta["val"].shape
        if not (same or node.target in CASTS | COPIES or (name == "slice" and steps.sinks is not None)):
            return f"'{node.name}' ({name}) stands between the normaliser and the values"
        node = node.args[0]
    return ""


def _finish(match: Match, steps: Steps, scope: Scope) -> None:
    if steps.softcap < 0 and not steps.reason:
        steps.reason = "the scores go through tanh without a cap"
    scores = match["scores"]
    if scores.target is aten.baddbmm.default:
        named = scope.named(scores)
        beta, alpha = named.get("beta", 1), named.get("alpha", 1)
        steps.scale *= float(alpha)
        if beta != 0:
            steps.masks.insert(0, ("add", named["self"], beta))
            if beta != 1:
                steps.reason = steps.reason or f"'{scores.name}' scales what it adds by {beta}"
    normaliser = match["normaliser"]
    dtype = scope.named(normaliser).get("dtype")
    if isinstance(dtype, torch.dtype):
        steps.dtype = dtype
