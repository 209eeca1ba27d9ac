"""The routing half of a mixture: from the choice of experts back to the router, and everything computed from its scores."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.language import CASTS, COPIES, VIEWS, Scope
from recast.patterns.linear.find import product_flops
from recast.patterns.provenance import origins
from recast.patterns.rules import Surroundings
from recast.patterns.sites import LinearSite, Use

__all__ = [
    "ALL",
    "CHOICES",
    "FRESH",
    "LOOKUPS",
    "Router",
    "by_table",
    "chooses",
    "entrances",
    "read_router",
    "values_read",
]

aten = torch.ops.aten

CHOICES: frozenset[Any] = frozenset({aten.topk.default, aten.argmax.default, aten.max.dim})
LOOKUPS: frozenset[Any] = frozenset({aten.gather.default})
FRESH: frozenset[Any] = frozenset(
    {
        aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.arange.default,
        aten.arange.start, aten.arange.start_step, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.empty_like.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default,
        aten.new_ones.default, aten.scalar_tensor.default,
    }
)  # fmt: skip
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
ALL: frozenset[Any] = frozenset({*_SOFTMAX, aten.sigmoid.default})  # weights for every expert: none is left out
_SUMS = {"sum", "norm", "linalg_vector_norm"}
_TABLES = {aten.index.Tensor, aten.index_select.default, aten.embedding.default}
_LIMIT = 150  # values between a router and the choice


@dataclasses.dataclass(frozen=True)
class Router:
    """A router, and what is made of its scores.

    Attributes
    ----------
    site, use
        The linear.
    cone
        Values computed from its scores and from weights alone, in graph order, the scores first.
    top_k, scoring, renormalised, corrected, groups, scale
        See `recast.patterns.sites.MoESite`.
    """

    site: LinearSite
    use: Use
    cone: dict[fx.Node, None]
    top_k: int
    scoring: str
    renormalised: bool
    corrected: bool
    groups: int
    scale: float


def read_router(choice: fx.Node, around: Surroundings) -> Router | str:
    """The router whose scores a choice is made among, or why there is none."""
    found = _router(choice, around)
    if isinstance(found, str):
        return found
    site, use = found
    before = _above(choice, use.node)
    table = [choice.args[2]] if choice.target in LOOKUPS and isinstance(choice.args[2], fx.Node) else []
    cone = _cone([use.node, *table], around)
    top_k = _top_k(choice, cone)
    if top_k is None:
        return "how many experts are chosen depends on the input"
    after = [n for n in cone if n not in before and n is not choice]
    scoring, late = _scoring({choice: None}, []) if choice.target in ALL else _scoring(before, after)
    groups = sorted((n for n in before if n.target is aten.topk.default), key=around.position.__getitem__)
    return Router(
        site,
        use,
        cone,
        top_k,
        scoring,
        late or any(_normalises(n, cone) for n in after),
        any(_corrects(n, around, cone) for n in before),
        _groups(groups),
        _scale(after, cone),
    )


def entrances(router: Router, around: Surroundings) -> Iterator[fx.Node]:
    """What enters the router: its last linear, and of a router of several those before, nearest first."""
    queue, seen = deque([router.use.x]), {router.use.x}
    while queue and len(seen) < 8:
        x = queue.popleft()
        yield x
        for origin in origins(x, around, limit=40):
            if origin.use.x not in seen:
                seen.add(origin.use.x)
                queue.append(origin.use.x)


def _groups(choices: list[fx.Node]) -> int:
    """Among how many groups of experts a first choice is made."""
    size = _last_size(choices[-1].args[0]) if choices else 0
    return size if size is not None and size > 1 else 0


def _router(choice: fx.Node, around: Surroundings) -> tuple[LinearSite, Use] | str:
    scores: Any = choice.args[0]
    seen, queue, found = {scores}, deque([scores]), dict[fx.Node, None]()
    while queue and len(seen) < _LIMIT:
        node = queue.popleft()
        if not isinstance(node, fx.Node) or node in around.scope.constants:
            continue
        if around.products(node):
            found[node] = None
            continue
        if node.op != "call_function" or product_flops(node):
            return f"the scores depend on '{node.name}', which is no linear of the tokens"
        for operand in values_read(node):
            value = operand.meta.get("val")
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if operand in seen or operand.target in FRESH or not (floating or operand.op == "call_function"):
                continue
            if isinstance(value, Tensor | tuple | list):
                seen.add(operand)
                queue.append(operand)
    if len(found) != 1:
        return f"the scores come from {len(found)} linears, not from one"
    pairs = around.products(next(iter(found)))
    if len(pairs) != 1:
        return "the scores come from a stack of matrices"
    return pairs[0]


def _above(choice: fx.Node, router: fx.Node) -> dict[fx.Node, None]:
    """Values between a router and the choice."""
    seen: dict[fx.Node, None] = {}
    queue = deque(n for n in choice.all_input_nodes)
    while queue:
        node = queue.popleft()
        if node in seen or node is router or node.op != "call_function" or len(seen) > _LIMIT:
            continue
        seen[node] = None
        queue.extend(node.all_input_nodes)
    return seen


def _cone(scores: list[fx.Node], around: Surroundings) -> dict[fx.Node, None]:
    """Values that depend on activations through these scores only. Products end it, and so does what joins other values."""
    cone: dict[fx.Node, None] = dict.fromkeys(scores)
    queued = {user for node in scores for user in node.users}
    waiting = [(around.position[u], u) for u in queued]
    heapq.heapify(waiting)
    while waiting:
        _, node = heapq.heappop(waiting)
        if node.op != "call_function" or around.products(node) or not all(
            _harmless(n, cone, around) for n in values_read(node)
        ):  # fmt: skip
            continue
        cone[node] = None
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(waiting, (around.position[user], user))
    return cone


def values_read(node: fx.Node) -> list[fx.Node]:
    """Operands whose values matter: of `type_as`, the other lends its dtype only."""
    if node.target is aten.type_as.default and isinstance(node.args[0], fx.Node):
        return [node.args[0]]
    return node.all_input_nodes


def _harmless(node: fx.Node, cone: dict[fx.Node, None], around: Surroundings) -> bool:
    value = node.meta.get("val")
    if node in cone or node in around.scope.constants or node.target in FRESH:
        return True
    return not (isinstance(value, Tensor) and value.is_floating_point()) and not isinstance(value, tuple | list)


def _last_size(value: Any) -> int | None:
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    size = held.shape[-1] if isinstance(held, Tensor) and held.ndim else None
    return size if isinstance(size, int) else None


def _top_k(choice: fx.Node, cone: dict[fx.Node, None]) -> int | None:
    if choice.target is aten.topk.default:
        return choice.args[1] if isinstance(choice.args[1], int) else None
    if choice.target in ALL:
        return _last_size(choice)
    if choice.target in LOOKUPS:
        return _last_size(choice.args[2])
    if choice.target is aten.argmax.default:  # one at a time, the first taken out before the second is looked for
        return sum(n.target is aten.argmax.default for n in cone)
    return max(1, sum(n.target is aten.max.dim and chooses(n) for n in cone))


def chooses(node: fx.Node) -> bool:
    """Whether places are asked for, not only the largest values."""
    return node.target is not aten.max.dim or any(len(u.args) > 1 and u.args[1] == 1 for u in node.users)


def by_table(node: fx.Node, scope: Scope) -> bool:
    """Whether scores are taken at places that a table of the model gives for each token: routing by hash."""
    at: Any = scope.arguments(node)[2]
    while isinstance(at, fx.Node) and at.op == "call_function" and at.target in VIEWS | CASTS | COPIES:
        at = at.args[0]
    if not isinstance(at, fx.Node) or at.target not in _TABLES or at.args[0] not in scope.constants:
        return False
    return not at.meta["val"].dtype.is_floating_point


def _scoring(before: dict[fx.Node, None], after: list[fx.Node]) -> tuple[str, bool]:
    """What makes weights of scores, and whether it is a softmax among the chosen ones alone."""
    for nodes, late in ((list(before), False), (after, True)):
        if any(n.target in _SOFTMAX for n in nodes):
            return "softmax", late
        if any(n.target is aten.sigmoid.default for n in nodes):
            return "sigmoid", False
        for n in nodes:
            kind = str(getattr(n.target, "_opname", ""))
            if kind in ("softplus", "tanh", "relu", "exp"):
                return kind, False
    return "none", False


def _normalises(node: fx.Node, cone: dict[fx.Node, None]) -> bool:
    """Whether a value is divided by a sum of itself."""
    if node.target is not aten.div.Tensor or not isinstance(node.args[1], fx.Node) or node.args[1] not in cone:
        return False
    at: Any = node.args[1]
    for _ in range(6):
        if not isinstance(at, fx.Node) or at not in cone:
            return False
        if str(getattr(at.target, "_opname", "")) in _SUMS:
            return True
        at = at.args[0] if at.args else None
    return False


def _corrects(node: fx.Node, around: Surroundings, cone: dict[fx.Node, None]) -> bool:
    """Whether a learned vector is added to scores before the choice."""
    return (
        node in cone
        and node.target in (aten.add.Tensor, aten.sub.Tensor)
        and any(a in around.scope.constants and a.meta["val"].numel() > 1 for a in node.all_input_nodes)
    )


def _scale(after: list[fx.Node], cone: dict[fx.Node, None]) -> float:
    found = 1.0
    for node in after:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or len(node.args) < 2:
            continue
        factor = node.args[1]
        if isinstance(factor, int | float) and not isinstance(factor, bool):
            if node.target is aten.mul.Tensor:
                found *= factor
            elif node.target is aten.div.Tensor:
                found /= factor
    return found
