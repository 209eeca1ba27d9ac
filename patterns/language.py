"""The pattern language: small values that say what a piece of a graph looks like, matched from its last operation upwards.

A pattern is matched against an operand (a graph value or a literal) and gives every way it fits, as a `State`: names bound so
far and the nodes taken in. Alternatives, optional and repeated steps are patterns themselves and stand at any place. What
failed deepest is kept in a `Trail`, so that a miss can say how far it came.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from recast.patterns.constants import Constants
from recast.patterns.program import Program

__all__ = [
    "CASTS",
    "COPIES",
    "VIEWS",
    "Any_",
    "Call",
    "Either",
    "Literal",
    "Match",
    "Pair",
    "Pattern",
    "Repeat",
    "Same",
    "Scope",
    "State",
    "Through",
    "Trail",
    "Weight",
    "among",
    "in_words",
    "match_at",
    "maybe",
]

aten = torch.ops.aten

VIEWS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.expand.default,
        aten.movedim.int,
    }
)
CASTS: frozenset[Any] = frozenset(
    {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default}
)
COPIES: frozenset[Any] = frozenset(
    {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
)


class Scope:
    """A program being looked at: its constants, and operands by position with defaults filled in."""

    def __init__(self, program: Program, constants: Constants | None = None) -> None:
        self.program = program
        self.constants = constants or Constants(program)
        # What was found out of values and is asked again and again: by a name of the question and what it is asked of.
        self.answers: dict[tuple[str, Any], Any] = {}
        self._arguments: dict[fx.Node, tuple[Any, ...]] = {}

    def arguments(self, node: fx.Node) -> tuple[Any, ...]:
        """Operands of a call in the order of its schema, defaults included."""
        found = self._arguments.get(node)
        if found is None:
            if getattr(node.target, "_schema", None) is None:
                found = (*node.args, *node.kwargs.values())
            else:
                names, defaults = _signature(node.target)
                found = (*node.args, *defaults[len(node.args) :])
                if node.kwargs:
                    found = tuple(node.kwargs.get(n, value) for n, value in zip(names, found, strict=True))
            self._arguments[node] = found
        return found

    def named(self, node: fx.Node) -> dict[str, Any]:
        """The same by name."""
        if getattr(node.target, "_schema", None) is None:
            return {str(i): value for i, value in enumerate(self.arguments(node))}
        return dict(zip(_signature(node.target)[0], self.arguments(node), strict=True))


@functools.lru_cache(maxsize=4096)
def _signature(operation: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names of the operands of an operation and their defaults, None where there is none."""
    arguments = operation._schema.arguments
    return tuple(a.name for a in arguments), tuple(
        a.default_value if a.has_default_value() else None for a in arguments
    )


class State(NamedTuple):  # made at every step, and a tuple is made faster than an object with attributes
    """What is known after a part of a pattern matched: bound names, and nodes taken in, the last first."""

    bound: Mapping[str, Any] = types.MappingProxyType({})
    nodes: tuple[fx.Node, ...] = ()

    def bind(self, name: str | None, value: Any) -> State | None:
        """With a name bound; None if it is bound to something else already."""
        if name is None:
            return self
        if name in self.bound:
            known = self.bound[name]
            return self if known is value or _alike(known, value) else None
        return State({**self.bound, name: value}, self.nodes)

    def take(self, node: fx.Node) -> State:
        """With a node taken in."""
        return State(self.bound, (*self.nodes, node))


Reason = str | Callable[[], str]


def in_words(reason: Reason) -> str:
    """The words of a reason."""
    return reason if isinstance(reason, str) else reason()


class Trail:
    """What failed in an attempt: at each value the failure that came deepest, and the deepest of all.

    Attributes
    ----------
    depth, node, reason
        Of the deepest failure: how many nodes were taken in, at which value, and why it ended there.
    seen
        Nodes taken in by then.
    failures
        ``{value: (depth, reason)}``; see `in_words`.
    """

    def __init__(self) -> None:
        self.depth = -1.0
        self.node: fx.Node | None = None
        self.seen: tuple[fx.Node, ...] = ()
        self.failures: dict[fx.Node, tuple[float, Reason]] = {}
        self._reason: Reason = ""

    @property
    def reason(self) -> str:
        """Why the deepest attempt ended."""
        return in_words(self._reason)

    def words(self) -> str:
        """The same, to be called when it is asked for."""
        return self.reason

    def fail(self, state: State, value: Any, reason: Reason, *, nearly: bool = False) -> None:
        """Note a failure; `nearly`: the operation is the right one, its form is not, which tells more.

        A reason may be a function that gives the words: most failures are never told of.
        """
        nodes = state.nodes
        depth = len(nodes) + 0.5 if nearly else len(nodes)
        node = value if isinstance(value, fx.Node) else (nodes[-1] if nodes else None)
        if node is not None:
            known = self.failures.get(node)
            if known is None or depth > known[0]:
                self.failures[node] = (depth, reason)
        if depth > self.depth:
            self.depth, self._reason, self.seen, self.node = depth, reason, nodes, node


class Pattern(abc.ABC):
    """What an operand looks like."""

    @abc.abstractmethod
    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Every way in which a value fits, given what is bound already."""

    def targets(self) -> Collection[Any] | None:
        """Operations with which a fitting value may end; None if it may be anything."""
        return None


Test = Callable[[Any, Scope], bool]


@dataclasses.dataclass(frozen=True)
class Any_(Pattern):  # `Any` is typing's
    """Any operand, bound to a name; `where` may look at it. Nothing is taken in."""

    name: str | None = None
    where: Test | None = None

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Bind it."""
        if self.where is not None and not self.where(value, scope):
            trail.fail(state, value, lambda: f"{_called(value)} is not of the kind that is needed here")
            return
        bound = state.bind(self.name, value)
        if bound is None:
            trail.fail(state, value, lambda: _differ(value, state.bound.get(str(self.name))))
            return
        yield bound


def Same(name: str) -> Pattern:  # reads as a pattern
    """The value bound to that name elsewhere."""
    return Any_(name)


@dataclasses.dataclass(frozen=True)
class Pair(Pattern):
    """A list of two operands, as `einsum` and `cat` take."""

    first: Pattern
    second: Pattern

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Match both."""
        if not isinstance(value, list | tuple) or len(value) != 2:
            trail.fail(state, value, "two operands are needed")
            return
        for found in self.first.match(value[0], state, scope, trail):
            yield from self.second.match(value[1], found, scope, trail)


@dataclasses.dataclass(frozen=True)
class Literal(Pattern):
    """A number, flag or list written into the graph: equal to `value`, or passing `where`; bound to a name.

    A constant tensor of one element counts as its number: models write scales both ways.
    """

    name: str | None = None
    value: Any = None
    where: Callable[[Any], bool] | None = None

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Compare and bind it."""
        number = literal(value, scope)
        if number is None and value is not None:
            trail.fail(state, value, lambda: f"{_called(value)} is computed, a literal is needed")
            return
        if self.value is not None and not _close(number, self.value):
            trail.fail(state, value, lambda: f"{number} where {self.value} is needed")
            return
        if self.where is not None and not self.where(number):
            trail.fail(state, value, lambda: f"{number} is not a number that fits here")
            return
        bound = state.bind(self.name, number)
        if bound is not None:
            yield bound


@dataclasses.dataclass(frozen=True)
class Weight(Pattern):
    """A constant: a weight or a function of weights alone."""

    name: str | None = None
    where: Test | None = None

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Bind it."""
        if value not in scope.constants:
            trail.fail(state, value, lambda: f"{_called(value)} is computed, a weight is needed")
            return
        yield from Any_(self.name, self.where).match(value, state, scope, trail)


@functools.lru_cache(maxsize=4096)
def _identities(ops: frozenset[Any]) -> frozenset[int]:
    return frozenset(map(id, ops))


def among(node: fx.Node, ops: frozenset[Any]) -> bool:
    """Whether a node calls one of some operations: by identity, as torch hashes an operation in Python, once for each look."""
    return id(node.target) in _identities(ops)


@dataclasses.dataclass(frozen=True)
class Call(Pattern):
    """A call of one of some operations.

    Parameters
    ----------
    ops
        The operations, overloads included.
    operands
        Patterns of the first operands, in the order of the schema; more operands than patterns may be there.
    commutes
        The first two operands may come in either order.
    name
        Name to bind the node to.
    named
        Patterns of further operands, by name.
    where
        Looks at the node.
    """

    ops: frozenset[Any]
    operands: tuple[Pattern, ...] = ()
    commutes: bool = False
    name: str | None = None
    named: tuple[tuple[str, Pattern], ...] = ()
    where: Test | None = None

    @functools.cached_property
    def _identities(self) -> frozenset[int]:
        return frozenset(map(id, self.ops))

    @staticmethod
    def of(
        ops: Any,
        *operands: Pattern,
        commutes: bool = False,
        name: str | None = None,
        where: Test | None = None,
        **named: Pattern,
    ) -> Call:
        """Shorter: one operation or several, operands as arguments."""
        found = frozenset(ops) if isinstance(ops, list | tuple | set | frozenset) else frozenset({ops})
        return Call(found, operands, commutes, name, tuple(named.items()), where)

    def targets(self) -> Collection[Any] | None:
        """Its operations."""
        return self.ops

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Take the node in, then match its operands."""
        if not isinstance(value, fx.Node) or id(value.target) not in self._identities or value.op != "call_function":
            trail.fail(state, value, lambda: f"{_called(value)} is not {_names(self.ops)}")
            return
        if self.where is not None and not self.where(value, scope):
            trail.fail(state, value, lambda: f"{_called(value)} has not the form that is needed", nearly=True)
            return
        bound = state.take(value).bind(self.name, value)
        if bound is None:
            trail.fail(state, value, lambda: _differ(value, state.bound.get(str(self.name))))
            return
        given = scope.arguments(value)
        if len(given) < len(self.operands):
            trail.fail(bound, value, lambda: f"{_called(value)} has fewer operands than are needed")
            return
        orders = [given]
        if self.commutes and len(given) > 1 and given[0] is not given[1]:
            orders.append((given[1], given[0], *given[2:]))
        by_name = scope.named(value) if self.named else {}
        for order in orders:
            pairs = [*zip(self.operands, order, strict=False), *((p, by_name.get(n)) for n, p in self.named)]
            yield from _all(pairs, bound, scope, trail)


def _all(pairs: list[tuple[Pattern, Any]], state: State, scope: Scope, trail: Trail) -> Iterator[State]:
    if not pairs:
        yield state
        return
    (pattern, value), rest = pairs[0], pairs[1:]
    for found in pattern.match(value, state, scope, trail):
        yield from _all(rest, found, scope, trail)


@dataclasses.dataclass(frozen=True)
class Either(Pattern):
    """One of several patterns, tried in order."""

    options: tuple[Pattern, ...]

    @staticmethod
    def of(*options: Pattern) -> Either:
        """Shorter."""
        return Either(options)

    def targets(self) -> Collection[Any] | None:
        """Those of all options."""
        found = [option.targets() for option in self.options]
        return None if any(f is None for f in found) else frozenset(itertools.chain(*(f for f in found if f)))

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Every way of every option."""
        called = id(value.target) if isinstance(value, fx.Node) and value.op == "call_function" else None
        for position, (option, ends) in enumerate(self._ends):
            # That one does not end with this operation is told once, by the first.
            if position == 0 or ends is None or called in ends:
                yield from option.match(value, state, scope, trail)

    @functools.cached_property
    def _ends(self) -> tuple[tuple[Pattern, frozenset[int] | None], ...]:
        targets = [option.targets() for option in self.options]
        ends = [None if t is None else frozenset(map(id, t)) for t in targets]
        return tuple(zip(self.options, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class Through(Pattern):
    """A pattern seen through views, casts and copies: any number of them may stand before it; they are taken in."""

    inner: Pattern
    ops: frozenset[Any] = VIEWS | CASTS | COPIES

    def targets(self) -> Collection[Any] | None:
        """Those of the pattern, and what it is seen through."""
        inner = self.inner.targets()
        return None if inner is None else frozenset((*inner, *self.ops))

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Match here, or one step further up."""
        while True:
            yield from self.inner.match(value, state, scope, trail)
            if not isinstance(value, fx.Node) or value.op != "call_function" or not among(value, self.ops):
                return
            state = state.take(value)
            value = value.args[0]


@dataclasses.dataclass(frozen=True)
class Repeat(Pattern):
    """Any number of steps, each wrapping the next, before `inner`: ``step(step(... inner))``.

    `step` makes the pattern of one step from the pattern of what it wraps.
    """

    step: Callable[[Pattern], Pattern]
    inner: Pattern
    limit: int = 12

    def match(self, value: Any, state: State, scope: Scope, trail: Trail) -> Iterator[State]:
        """Stop here, or take one step."""
        yield from self.inner.match(value, state, scope, trail)
        if self.limit:
            yield from self.step(Repeat(self.step, self.inner, self.limit - 1)).match(value, state, scope, trail)


def maybe(step: Callable[[Pattern], Pattern], inner: Pattern) -> Pattern:
    """``step(inner)`` or ``inner``."""
    return Either((step(inner), inner))


@dataclasses.dataclass(frozen=True)
class Match:
    """A place that fits: the last node, the names bound, and every node taken in, in graph order."""

    root: fx.Node
    bound: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What is bound to a name, or a default."""
        return self.bound.get(name, default)

    @property
    def used_outside(self) -> list[fx.Node]:
        """Nodes taken in, other than the last, whose values something outside reads too: they stay if the match is replaced."""
        inside = set(self.nodes)
        return [n for n in self.nodes if n is not self.root and any(u not in inside for u in n.users)]


def match_at(pattern: Pattern, root: fx.Node, scope: Scope, trail: Trail | None = None) -> Match | Trail:
    """Match a pattern at a value.

    Returns
    -------
    Match or Trail
        The first way it fits, or how far it came.
    """
    trail = trail or Trail()
    for state in pattern.match(root, State(), scope, trail):
        nodes = tuple(dict.fromkeys(reversed(state.nodes)))
        return Match(root, state.bound, nodes)
    return trail


def literal(value: Any, scope: Scope) -> Any:
    """The number (or list) that an operand is; None if it is computed. A weight of one element is its number."""
    if not isinstance(value, fx.Node):
        return (
            list(value) if isinstance(value, list | tuple) and not any(isinstance(v, fx.Node) for v in value) else value
        )
    held = value.meta.get("val")
    if value in scope.constants and isinstance(held, Tensor) and held.numel() == 1:
        found = scope.constants.value(value)
        return found.item() if isinstance(found, Tensor) and found.device.type != "meta" else None
    if value.op == "call_function" and value.target in _FILLED:
        return literal(value.args[_FILLED[value.target]], scope)
    return None


_FILLED = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.full_like.default: 1}


def _close(found: Any, wanted: Any) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted))
    return bool(found == wanted)


_READS: frozenset[Any] = VIEWS | CASTS | COPIES | {aten.slice.Tensor, aten.select.int}


def _alike(one: Any, other: Any, depth: int = 4) -> bool:
    """Whether two operands are equal for certain: equal literals, or one value read twice in the same words (``x[..., :8]``)."""
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return not isinstance(one, fx.Node) and not isinstance(other, fx.Node) and bool(one == other)
    if one is other:
        return True
    if not depth or one.target is not other.target or one.op != "call_function" or not among(one, _READS):
        return False
    if len(one.args) != len(other.args) or one.kwargs != other.kwargs:
        return False
    source, *how = one.args
    return how == list(other.args[1:]) and _alike(source, other.args[0], depth - 1)


def _differ(value: Any, known: Any) -> str:
    """What to say where one value is needed in two places."""
    return f"{_called(value)} and {_called(known)} are two values where one is needed"


def _called(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    kind = getattr(value.target, "_opname", value.target) if value.op == "call_function" else value.op
    return f"'{value.name}' ({kind})"


def _names(ops: Collection[Any]) -> str:
    names = sorted({str(getattr(op, "_opname", getattr(op, "__name__", op))) for op in ops})
    return " or ".join(names[:4]) + (" ..." if len(names) > 4 else "")
