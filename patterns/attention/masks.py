"""Which keys a mask leaves to a query, found by computing it at the example's sizes.

How a mask is written says little: `j < i`, `~(j >= i)` and a triangle that is negated all compare positions. What is computed
says it: a causal mask leaves each query the keys up to its own place, a sliding one the last few of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.linear.packing import size_hint
from recast.patterns.rules import Surroundings

__all__ = ["kind_of_kept"]

_FAR = 300  # values that a mask is computed from
_LARGE = 1 << 22  # elements of one of them
_SHAPE_ALONE = ("_like", "new_", "sym_size")  # what reads a value only for its shape
_COMPARES = {"sub", "rsub", "add", "gt", "lt", "le", "ge"}
_GROUPS = {"div", "floor_divide", "remainder", "fmod"}


def kind_of_kept(masks: Sequence[tuple[str, Any, Any]], around: Surroundings) -> str | None:
    """``causal`` or ``sliding`` if masks together leave exactly that; None if they do not, or if it cannot be told.

    Inputs are taken as ones (nothing is padding), positions given as input count up.

    Parameters
    ----------
    masks
        As in `AttentionSite`.
    around
        The program.
    """
    answers, asked = around.scope.answers, ("kept", tuple((kind, mask) for kind, mask, _ in masks))
    if asked not in answers:  # layers share a mask
        try:
            with torch.no_grad():
                answers[asked] = _kind_of_kept(masks, around)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):  # what cannot be computed here is not named
            answers[asked] = None
    found: str | None = answers[asked]
    return found


def _kind_of_kept(masks: Sequence[tuple[str, Any, Any]], around: Surroundings) -> str | None:
    kept: Tensor | None = None
    seen: dict[fx.Node, Any] = {}
    for kind, mask, _ in masks:
        value = _computed(mask, around, seen) if isinstance(mask, fx.Node) else None
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        own = value.to(torch.bool) if kind != "add" else _added_nothing(value)
        if own is None:
            return None
        own = ~own if kind == "drop" else own
        kept = own if kept is None else kept & own
    if kept is None or min(kept.shape[-2:]) < 2:
        return None
    rows = kept.reshape(-1, *kept.shape[-2:])
    if not bool((rows == rows[:1]).all()):
        return None
    return _kind(rows[0], _beyond(seen, max(kept.shape[-2:])))


def _added_nothing(value: Tensor) -> Tensor | None:
    """Where a mask that is added leaves the score: of two values the larger."""
    if not value.is_floating_point() or len(torch.unique(value)) != 2:
        return None
    return value == value.max()


def _kind(kept: Tensor, beyond: set[str]) -> str | None:
    queries, keys = kept.shape
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    for far in (distance, distance - (keys - queries)):  # queries stand at the end of the keys, or at their start
        if torch.equal(kept, far >= 0):
            return "causal" if not beyond else "sliding" if beyond == {"window"} else None
        width = int(kept.sum(-1).max())
        if width and torch.equal(kept, (far >= 0) & (far < width)):
            return "sliding"
    return None


def _beyond(nodes: dict[fx.Node, Any], size: int) -> set[str]:
    """What compares with numbers as large as the example is long, and shows only in a longer one: a window, or groups."""
    found = set()
    for node in nodes:
        name = str(getattr(node.target, "_opname", ""))
        if any(isinstance(a, int) and size <= abs(a) < 1 << 31 for a in node.args) and name in _COMPARES | _GROUPS:
            found.add("window" if name in _COMPARES else "groups")
    return found


def _computed(mask: fx.Node, around: Surroundings, seen: dict[fx.Node, Any]) -> Any:
    """The value of a mask at the example's sizes; None if too much is needed for it."""
    needed: dict[fx.Node, None] = {}
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in needed or node in seen:
            continue
        needed[node] = None
        if len(needed) > _FAR:
            return None
        held = node.meta.get("val")
        if isinstance(held, Tensor):
            count = 1
            for size in held.shape:
                count *= size_hint(size)
            if count > _LARGE and node.op == "call_function":
                return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        if _is_leaf(node, around):
            continue
        stack += [n for n in node.all_input_nodes if not _shape_alone(node)]
    for node in sorted(needed, key=around.position.__getitem__):
        seen[node] = _run(node, around, seen)
    return seen.get(mask)


def _is_leaf(node: fx.Node, around: Surroundings) -> bool:
    return (
        node.op != "call_function"
        or node in around.scope.constants
        or not isinstance(node.meta.get("val"), Tensor | tuple)
    )


def _shape_alone(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_opname", ""))
    return any(word in name for word in _SHAPE_ALONE)


def _run(node: fx.Node, around: Surroundings, seen: dict[fx.Node, Any]) -> Any:
    held = node.meta.get("val")
    if node in around.scope.constants:
        constant = around.scope.constants.value(node)
        return constant.cpu() if isinstance(constant, Tensor) else constant
    if not isinstance(held, Tensor | tuple):
        return size_hint(held)
    if node.op != "call_function":
        shape = [size_hint(s) for s in held.shape]  # type: ignore[union-attr]
        if "position" in node.name and shape:
            return torch.arange(shape[-1]).expand(shape).to(held.dtype)  # type: ignore[union-attr]
        return torch.ones(shape, dtype=held.dtype)  # type: ignore[union-attr]

    def given(value: fx.Node) -> Any:
        if value in seen:
            return seen[value]
        own = value.meta.get("val")
        if not isinstance(own, Tensor):
            return size_hint(own)
        return torch.zeros((), dtype=own.dtype).expand([size_hint(s) for s in own.shape])

    args = fx.node.map_arg(node.args, given)
    kwargs = dict(fx.node.map_arg(node.kwargs, given))
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: size_hint(a) if isinstance(a, torch.SymInt) else a)
    return node.target(*args, **kwargs)  # type: ignore[operator]
