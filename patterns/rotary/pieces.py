"""Pieces of rotary embeddings: parts of the last dimension, and values joined along it, however they are written."""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.language import Pattern, Scope, State, Trail, among
from recast.patterns.norm.site import same_size
from recast.patterns.program import fixed_size

__all__ = ["Joined", "Part", "joined", "part_read", "range_read", "same_rows"]

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_FLAT = _VIEWS | {aten.flatten.using_ints}
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes})


def _features(node: Any) -> tuple[int, int] | None:
    """Number of dimensions of a value, and size of the last one; None if that is free."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    size = fixed_size(value.shape[-1])
    return None if size is None else (value.ndim, size)


def _any(args: Any) -> Any:
    """Operands without the types of fx, which allow for everything everywhere."""
    return args


def _is_last(dim: Any, ndim: int) -> bool:
    return isinstance(dim, int) and dim % ndim == ndim - 1


def same_rows(flat: fx.Node, pairs: fx.Node) -> bool:
    """Whether (..., n) and (..., n / 2, 2) agree in all but the features, for every input: no rows change places between."""
    rows, others = flat.meta["val"].shape[:-1], pairs.meta["val"].shape[:-2]
    return len(rows) == len(others) and all(same_size(a, b) for a, b in zip(rows, others, strict=True))


def range_read(node: fx.Node) -> tuple[fx.Node, int, int, int, tuple[fx.Node, ...]] | None:
    """Which features of another value a value shows: ``(source, start, stop, step, nodes)``; None if it is no such view."""
    if node.op != "call_function":
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.slice.Tensor:
        source, dim, start, stop, step = (*args, *(None,) * 5)[:5]
        dim, step = (dim or 0), (1 if step is None else step)
        shape = _features(source)
        if shape is None or not isinstance(source, fx.Node) or not _is_last(dim, shape[0]):
            return None
        numbers = [0 if start is None else start, shape[1] if stop is None else stop, step]
        if not all(isinstance(n, int) for n in numbers):
            return None
        first, last = (min(n + shape[1] if n < 0 else n, shape[1]) for n in numbers[:2])
        source, passed = _unsliced(source)
        return source, first, last, numbers[2], (*passed, node)
    if node.target is operator.getitem and isinstance(args[0], fx.Node) and isinstance(args[1], int):
        split, index = args
        if split.target not in _SPLITS or not isinstance(split.args[0], fx.Node):
            return None
        source = split.args[0]
        shape = _features(source)
        given = (*split.args, *split.kwargs.values())
        dim = given[2] if len(given) > 2 else 0
        if shape is None or not _is_last(dim, shape[0]):
            return None
        widths = [fixed_size(part.shape[-1]) or 0 for part in split.meta["val"]]
        start = sum(widths[:index])
        return source, start, start + widths[index], 1, (split, node)
    return None


def _unsliced(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What ``x[:]`` is taken of, and the slices passed on the way: each colon of ``x[:, :, ::2]`` leaves one."""
    passed: tuple[fx.Node, ...] = ()
    while node.target is aten.slice.Tensor:
        source, _, start, stop, step = (*_any(node.args), *(None,) * 5)[:5]
        if start not in (None, 0) or stop not in (None, sys.maxsize) or step not in (None, 1):
            break
        node, passed = source, (node, *passed)
    return node, passed


def part_read(node: fx.Node) -> tuple[fx.Node, str, int, tuple[fx.Node, ...]] | None:
    """Whether a value is one of two halves of another, or its even or odd features: ``(source, layout, which, nodes)``."""
    found = range_read(node)
    if found is not None:
        source, start, stop, step, nodes = found
        size = (_features(source) or (0, 0))[1]
        if size % 2:
            return None
        if step == 1 and (start, stop) in ((0, size // 2), (size // 2, size)):
            return source, "half", int(start > 0), nodes
        if step == 2 and start < 2 and stop == size:
            return source, "interleaved", start, nodes
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.select.int and isinstance(args[0], fx.Node):
        pairs, dim, index = args[:3]
        nodes = (node,)
    elif node.target is operator.getitem and getattr(node.args[0], "target", None) is aten.unbind.int:
        unbind: Any = node.args[0]
        pairs, dim, index = unbind.args[0], (*unbind.args[1:], *unbind.kwargs.values(), 0)[0], args[1]
        nodes = (unbind, node)
    else:
        return None
    shape = _features(pairs)
    if shape is None or not isinstance(pairs, fx.Node) or shape[1] != 2 or not _is_last(dim, shape[0]):
        return None
    if pairs.target not in _VIEWS | {aten.unflatten.int} or not isinstance(index, int):
        return None
    source = _any(pairs.args)[0]
    if _features(source) != (shape[0] - 1, 2 * (fixed_size(pairs.meta["val"].shape[-2]) or 0)):
        return None
    if not isinstance(source, fx.Node) or not same_rows(source, pairs):
        return None
    return source, "interleaved", index % 2, (pairs, *nodes)


def joined(node: fx.Node) -> tuple[list[Any], str, tuple[fx.Node, ...]] | None:
    """What a value is made of along its last dimension: one behind the other (``half``) or by turns (``interleaved``)."""
    if node.op != "call_function":
        return None
    args = _any(node.args)
    if node.target is aten.cat.default:
        shape, dim = _features(node), (*args[1:], *node.kwargs.values(), 0)[0]
        return (list(args[0]), "half", (node,)) if shape is not None and _is_last(dim, shape[0]) else None
    stack: Any = args[0] if among(node, _FLAT) else None
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default:  # what most values are
        return None
    shape = _features(node)
    if shape is None:
        return None
    pairs = _features(stack)
    dim = (*stack.args[1:], *stack.kwargs.values(), 0)[0]
    # Flattening (..., n, 2) to (..., 2n): neighbours of the result come from different parts.
    if pairs is None or pairs != (shape[0] + 1, 2) or not _is_last(dim, pairs[0]):
        return None
    if shape[1] != 2 * (fixed_size(stack.meta["val"].shape[-2]) or 0) or not same_rows(node, stack):
        return None
    return list(_any(stack.args)[0]), "interleaved", (stack, node)


@dataclasses.dataclass(frozen=True)
class Part(Pattern):
    """The first (0) or second (1) features of pairs; which pairs is bound to ``layout``."""

    index: int
    inner: Pattern

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Take the views in, then match what they show."""
        found = part_read(value) if isinstance(value, fx.Node) else None
        if found is None or found[2] != self.index:
            which = ("first", "second")[self.index]
            trail.fail(state, value, lambda: f"'{value}' does not show the {which} features of pairs")
            return
        source, layout, _, nodes = found
        for node in reversed(nodes):
            state = state.take(node)
        bound = state.bind("layout", layout)
        if bound is None:
            trail.fail(state, value, f"'{value}' pairs other features than the rest")
            return
        yield from self.inner.match(source, bound, scope, trail)


@dataclasses.dataclass(frozen=True)
class Joined(Pattern):
    """Two values joined along the last dimension; how is bound to a name."""

    parts: tuple[Pattern, Pattern]
    how: str
    ways: tuple[str, ...] = ("half", "interleaved")

    def targets(self) -> Collection[Any]:
        """Concatenation, and what flattens a stack."""
        return {aten.cat.default, *_FLAT} if "interleaved" in self.ways else {aten.cat.default}

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Take the concatenation in, then match both parts."""
        found = joined(value) if isinstance(value, fx.Node) else None
        if found is None or len(found[0]) != 2 or found[1] not in self.ways:
            trail.fail(state, value, lambda: f"'{value}' does not join two values along the last dimension")
            return
        for node in reversed(found[2]):
            state = state.take(node)
        bound = state.bind(self.how, found[1])
        if bound is None:
            trail.fail(state, value, f"'{value}' joins its parts another way")
            return
        for first in self.parts[0].match(found[0][0], bound, scope, trail):
            yield from self.parts[1].match(found[0][1], first, scope, trail)
