"""Following a value through operations that only move its elements: along features, and by number."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.linear.packing import size_hint
from recast.patterns.program import fixed_size

__all__ = [
    "Sink",
    "is_cast",
    "keeps_features",
    "moves",
    "numbered",
    "origin_of",
    "ranges_of",
    "readers_of",
    "reshapes",
    "root_of",
    "run_on",
    "sinks_of",
]

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default}
_TAKES = {aten.slice.Tensor: 1, aten.select.int: 1, aten.narrow.default: 1}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int}
_CASTS = {aten._to_copy.default, aten.to.dtype, aten.type_as.default}
_TURNS = {aten.permute.default, aten.transpose.int, aten.t.default}
_MOVES = _RESHAPES | _COPIES | set(_TAKES) | _SPLITS | _TURNS | {aten.expand.default}


def _last(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return fixed_size(value.shape[-1]) if isinstance(value, Tensor) and value.ndim else None


def moves(node: fx.Node) -> bool:
    """Whether a node only moves elements of its one tensor operand (repeating some, leaving out others)."""
    return node.target in _MOVES or node.target is operator.getitem


def keeps_features(node: fx.Node) -> bool:
    """Whether a node moves whole vectors along the last dimension, each element staying at its place in its vector.

    Equal last sizes are enough for a reshape: elements keep their order, so the place is the flat position modulo the size.
    """
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source = node.args[0]
    before, after = _last(source), _last(node)
    if before is None or before != after:
        return False
    rank, args = source.meta["val"].ndim, list[Any](node.args)
    if node.target in _RESHAPES | _COPIES:
        return True
    if node.target in _TAKES:
        return bool(int(args[1] if len(args) > 1 else 0) % rank != rank - 1)
    if node.target is aten.transpose.int:
        return all(int(d) % rank != rank - 1 for d in args[1:3])
    if node.target is aten.permute.default:
        return bool(int(args[1][-1]) % rank == rank - 1)
    return node.target is aten.expand.default


def reshapes(node: fx.Node) -> bool:
    """Whether a node gives the same elements in the same order, vectors along the last dimension whole."""
    return node.target in _RESHAPES | _COPIES and keeps_features(node)


def root_of(node: fx.Node) -> fx.Node:
    """What a value is a reshape of."""
    while reshapes(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the floating dtype of its operand and nothing else."""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.is_floating_point()
        and after.is_floating_point()
    )


def readers_of(node: fx.Node, *, casts: bool = False) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a value beyond movements that keep features (and casts, if asked), as ``(reader, value read)``."""
    found, todo = [], [node]
    while todo:
        value = todo.pop()
        for user in value.users:
            if (keeps_features(user) or (casts and is_cast(user))) and user.args[0] is value:
                todo.append(user)
            else:
                found.append((user, value))
    return found


@dataclasses.dataclass(frozen=True)
class Sink:
    """Where a value ends after movements.

    Parameters
    ----------
    node, value
        The operation that reads it, and what it reads.
    index
        For each element of `value`, the number of the element of the starting value's axis.
    path
        Movements from the start, `value` last.
    """

    node: fx.Node
    value: fx.Node
    index: Tensor
    path: tuple[fx.Node, ...]


def origin_of(node: fx.Node) -> fx.Node:
    """What a value is before any movement."""
    while node.op == "call_function" and moves(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def numbered(node: fx.Node, axis: int = -1) -> Tensor:
    """Numbers along one axis of a value, the same along the others, at the captured example's sizes."""
    shape = [size_hint(s) for s in node.meta["val"].shape]
    axis %= len(shape)
    numbers = torch.arange(shape[axis], dtype=torch.int32)
    return numbers.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).contiguous()


def run_on(node: fx.Node, value: Any) -> Any:
    """Run one movement on stand-in data of the example's sizes."""

    def concrete(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            meta = arg.meta.get("val")
            return size_hint(meta) if isinstance(meta, int | torch.SymInt) else value
        return size_hint(arg) if isinstance(arg, torch.SymInt) else arg

    args = fx.node.map_aggregate(node.args, concrete)
    kwargs = fx.node.map_aggregate(node.kwargs, concrete)
    target: Any = node.target
    if target in (aten.view.default, aten._unsafe_view.default):
        target = aten.reshape.default  # strides are none of our business here
    return target(*args, **kwargs)


def sinks_of(start: fx.Node, index: Tensor | None = None) -> list[Sink]:
    """Everything that reads a value beyond movements, with what became of numbers along its last axis.

    Parameters
    ----------
    start
        A tensor value.
    index
        Numbers to follow instead, of the example's shape.
    """
    found: list[Sink] = []
    first: Any = numbered(start) if index is None else index
    todo: list[tuple[fx.Node, Any, tuple[fx.Node, ...]]] = [(start, first, ())]
    while todo:
        value, index, path = todo.pop()
        for user in value.users:
            if user.op == "call_function" and moves(user) and user.args[0] is value:
                todo.append((user, run_on(user, index), (*path, user)))
            else:
                found.append(Sink(user, value, index, path))
    return found


def ranges_of(rows: set[int]) -> list[tuple[int, int]]:
    """Half-open ranges that hold some numbers.

    Examples
    --------
    >>> ranges_of({0, 1, 2, 5})
    [(0, 3), (5, 6)]
    """
    found: list[tuple[int, int]] = []
    for row in sorted(rows):
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return found
