"""What happens to the scores between the product and the normaliser, read in order: scale, soft cap, masks, sinks."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.language import CASTS, COPIES, VIEWS, Match, Scope, literal

__all__ = ["Steps", "read_steps"]

aten = torch.ops.aten

_REORDERS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int})


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
    keys
        Which dimension of the product of queries with keys the normaliser runs along, from the end; 0 where that is not known.
    unread
        Whether a step with a computed value was not understood, which may be one of a mask.
    reason
        Why the steps are in no canonical order; empty if they are. What comes after is read all the same, for its names.
    """

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
    sinks: fx.Node | None = None
    dtype: torch.dtype | None = None
    keys: int = -1
    unread: bool = False
    reason: str = ""

    def give_up(self, reason: str) -> None:
        """Keep the first reason."""
        self.reason = self.reason or reason


def read_steps(match: Match, scope: Scope) -> Steps:
    """Follow the scores from the product to the normaliser."""
    steps, inside = Steps(), set(match.nodes)
    node, ended = match["scores"], match.get("exponential", match["normaliser"])
    places = [*range(-node.meta["val"].ndim, 0)]  # which dimension of the product each one is by now
    while node is not ended:
        readers = [u for u in node.users if u in inside]
        if not readers:
            steps.give_up(f"'{node.name}' is read by nothing that matched")
            break
        # The largest score is read twice: by what finds it and by what takes it off.
        user = next((u for u in readers if u.target is aten.sub.Tensor), readers[0])
        if user is not ended:
            _read(user, node, steps, scope)
            places = _moved(user, node, places, scope)
        node = user
    steps.keys = places[-1] if places else 0
    _finish(match, steps, scope)
    steps.give_up(_behind(match, steps))
    return steps


def _moved(user: fx.Node, before: fx.Node, places: list[int], scope: Scope) -> list[int]:
    """Where each dimension comes from after one more step; 0 where it is not known."""
    held = user.meta.get("val")
    if not isinstance(held, Tensor):  # several results, of which one is taken next
        return places
    if user.target not in VIEWS:
        return places if held.ndim == len(places) else [0] * held.ndim
    operands, count = scope.arguments(user), len(places)
    if user.target is aten.permute.default:
        return [places[d] for d in operands[1]]
    if user.target in _REORDERS:
        first, second = (0, 1) if user.target is aten.t.default else operands[1:3]
        order = [*range(count)]
        if user.target is aten.movedim.int:
            order.insert(second % count, order.pop(first % count))
        else:
            order[first], order[second] = order[second], order[first]
        return [places[d] for d in order]
    sizes, old = list(held.shape), list(before.meta["val"].shape)
    kept = 0  # dimensions at the end that a view leaves as they are
    while kept < min(len(sizes), count) and sizes[-1 - kept] == old[-1 - kept]:
        kept += 1
    return [0] * (len(sizes) - kept) + places[count - kept :]


def _same_places(user: fx.Node, before: fx.Node) -> bool:
    """Whether a view leaves every value where it is; two sizes that are equal may well have changed places."""
    return user.target in VIEWS - _REORDERS and bool(user.meta["val"].shape == before.meta["val"].shape)


def _read(user: fx.Node, before: fx.Node, steps: Steps, scope: Scope) -> None:
    operands, target = scope.arguments(user), user.target
    name = str(getattr(target, "_opname", target))
    if target in COPIES or _same_places(user, before):
        return
    if target in CASTS:
        steps.dtype = user.meta["val"].dtype
        return
    if target in VIEWS:
        moved = "the places" if target in _REORDERS else "the shape"
        steps.give_up(f"'{user.name}' changes {moved} of the scores")
        return
    other = next((o for o in operands[:2] if o is not before), None)
    number = literal(other, scope)
    if name in ("mul", "div") and isinstance(number, int | float) and (name == "mul" or operands[0] is before):
        factor = float(number) if name == "mul" else 1 / float(number)
        if steps.masks:
            steps.give_up(f"'{user.name}' scales the scores after they were masked")
        # c tanh(s q k) = c tanh((s c) q k / c): every factor behind the soft cap is one of the cap
        steps.scale *= factor
        steps.softcap *= factor
    elif name == "tanh":
        if steps.softcap or steps.masks:
            steps.give_up(f"'{user.name}' bounds the scores after they were {'masked' if steps.masks else 'bounded'}")
        steps.softcap = 1.0
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
        steps.unread = steps.unread or (name in ("mul", "sub", "add", "div") and isinstance(other, fx.Node))
        steps.give_up(f"'{user.name}' ({name}) is no step that has a canonical place")


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
        steps.give_up(f"a mask fills in '{value}', which is computed")
    steps.masks.append((kind, mask, number))


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
        same = _same_places(node, node.args[0])
        if not (same or node.target in CASTS | COPIES or (name == "slice" and steps.sinks is not None)):
            return f"'{node.name}' ({name}) stands between the normaliser and the values"
        node = node.args[0]
    return ""


def _finish(match: Match, steps: Steps, scope: Scope) -> None:
    scores = match["scores"]
    if scores.target is aten.baddbmm.default:
        named = scope.named(scores)
        beta, alpha = named.get("beta", 1), named.get("alpha", 1)
        steps.scale *= float(alpha)
        if beta != 0:
            steps.masks.insert(0, ("add", named["self"], beta))
            if beta != 1:
                steps.give_up(f"'{scores.name}' scales what it adds by {beta}")
    normaliser = match.get("exponential", match["normaliser"])
    dtype = scope.named(normaliser).get("dtype")
    if isinstance(dtype, torch.dtype):
        steps.dtype = dtype
