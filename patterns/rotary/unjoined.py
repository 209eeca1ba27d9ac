"""Rotations that cannot be one operation of the dialect, as their parts are not joined: told of, with what becomes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from recast.patterns.language import CASTS, COPIES, Call, Match, among
from recast.patterns.rotary.pieces import part_read, range_read
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import Site

__all__ = ["RULES"]

aten = torch.ops.aten

_SAME = CASTS | COPIES
_JOINS = frozenset({aten.cat.default, aten.stack.default})
_WRITES = frozenset(
    {aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default, aten.copy.default}
)


def _uncast(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.op == "call_function" and among(node, _SAME):
        node = node.args[0]
    return node


def _shown(node: Any) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """What a value shows features of, and which; None if it is no such view."""
    node = _uncast(node)
    if not isinstance(node, fx.Node):
        return None
    read = range_read(node)
    if read is not None:
        return _uncast(read[0]), read[1:4]
    part = part_read(node)
    return None if part is None else (_uncast(part[0]), part[1:3])


def _scaled(node: Any) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The same of what is multiplied."""
    node = _uncast(node)
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return None
    return next((shown for a in node.args if (shown := _shown(a)) is not None), None)


def _turns(node: fx.Node) -> bool:
    """Whether a difference is ``a cos - b sin`` of two parts of one value."""
    one = _scaled(node.args[0])
    other = None if one is None else _scaled(node.args[1])
    return one is not None and other is not None and one[0] is other[0] and one[1] != other[1]


def _swaps(node: fx.Node) -> bool:
    """Whether a part of a value is negated and joined with another part, where the two are not all of it."""
    one = _shown(node.args[0])
    if one is None or part_read(_uncast(node.args[0])) is not None:
        return False
    others = [_shown(a) for user in node.users if user.target in _JOINS for a in _parts(user)]
    return any(other is not None and other[0] is one[0] and other[1] != one[1] for other in others)


def _parts(join: fx.Node) -> list[Any]:
    args: Any = join.args
    return list(args[0])


def _build(match: Match, around: Surroundings) -> Site | str:
    """Say what becomes of the rotated features."""
    node = match.root
    if node.target is aten.neg.default:
        one = _shown(node.args[0])
        assert one is not None
        return f"'{node.name}' and what it is joined with are parts of '{one[0].name}', not the two halves of a value"
    one = _scaled(node.args[0])
    assert one is not None
    start = f"features of '{one[0].name}' are rotated, and the result '{node.name}'"
    user = next(iter(node.users), None)
    while user is not None and among(user, _SAME):
        user = next(iter(user.users), None)
    if user is None or user.op != "call_function":
        return f"{start} is joined with nothing"
    if user.target in _WRITES:
        return f"{start} is written into another value by '{user.name}', not joined with the others"
    if user.target in _JOINS and len(_parts(user)) > 2:
        return f"{start} is joined with {len(_parts(user)) - 1} others in '{user.name}', one is needed, then what is not rotated"
    return f"{start} is read by '{user.name}', which does not join it with the other one"


def _rotates(node: fx.Node, around: Any) -> bool:
    return _turns(node) if node.target is aten.sub.Tensor else _swaps(node)


RULES = (
    Rule(
        "rotary_unjoined",
        "rotary",
        Call.of([aten.sub.Tensor, aten.neg.default], where=_rotates),
        _build,
        anchors=frozenset({aten.sub.Tensor, aten.neg.default}),
        suspicious=_rotates,
        order=22,
    ),
)
