"""Fold: a constant factor goes back into the linear it comes from, as 1/sqrt(d) into W_Q."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, fx

from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import is_cast, moves, origin_of, ranges_of, sinks_of
from recast.passes.structures import SDPA, arguments, number_of
from recast.patterns.derivation import Derivation
from recast.patterns.sites import LinearSite, Use

__all__ = ["FoldScale"]

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, SDPA)
_LIMIT = 60  # values between a factor and its linear


@dataclasses.dataclass
class _Cone:
    """Values between a factor and the linears, all of which are multiplied when the linears are."""

    inner: dict[fx.Node, None] = dataclasses.field(default_factory=dict)
    leaves: dict[fx.Node, tuple[LinearSite, Use]] = dataclasses.field(default_factory=dict)
    reason: str = ""
    reached: bool = False

    def copy(self) -> _Cone:
        return _Cone(dict(self.inner), dict(self.leaves), self.reason, self.reached)


@dataclasses.dataclass(frozen=True)
class FoldScale(ExactPass):
    """``c f(x W^T + b)  ->  f(x (c W)^T + c b)`` for f that only moves, adds, negates or multiplies (rotary, q k^T).

    Parameters
    ----------
    fused
        Also take the factor out of `scaled_dot_product_attention`, whose kernels apply it at no cost; off by default.
    """

    name: ClassVar[str] = "fold_scale"
    fused: bool = False

    def apply(self, edit: Edit) -> None:
        """Fold every constant factor that leads back to linears of its own."""
        touched: set[str] = set()
        for node in list(edit.graph.nodes):
            if node.op != "call_function" or node in edit.constants:
                continue
            if node.target is SDPA and self.fused:
                start, factor = node.args[0], _scale(node)
            else:
                start, factor = node.args[0] if node.args else None, number_of(node)
            if not factor or factor == 1 or not math.isfinite(factor) or not isinstance(start, fx.Node):
                continue
            if not _same_type(node, start):
                continue
            if any(user.target is aten.tanh.default for user in node.users):
                edit.refuse(node.name, "it is one half of a soft cap, which would not be known as one any more", node)
                continue
            cone = _Cone()
            if not _push(edit, start, cone) or not _closed(edit, cone, node):
                # A factor anywhere in a model is no chance missed; one of an attention is.
                if _near_product(node):
                    edit.refuse(node.name, cone.reason, node)
                continue
            names = {site.name for site, _ in cone.leaves.values()}
            if touched & names:
                continue
            touched |= names
            _fold(edit, cone, factor, node)
            if node.target is SDPA:
                node.kwargs = {**node.kwargs, "scale": 1.0}
            else:
                edit.replace(node, start)
            edit.did(f"{factor:.6g} -> {', '.join(sorted(names))}")


def _scale(node: fx.Node) -> float | None:
    given = arguments(node)["scale"]
    if given is None:
        size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        return 1 / math.sqrt(size) if isinstance(size, int) else None
    return float(given) if isinstance(given, int | float) else None


def _same_type(node: fx.Node, start: fx.Node) -> bool:
    a, b = node.meta.get("val"), start.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.is_floating_point()


def _near_product(node: fx.Node) -> bool:
    source = node.args[0]
    return any(u.target in _PRODUCTS for u in node.users) or getattr(source, "target", None) in _PRODUCTS


def _push(edit: Edit, node: fx.Node, cone: _Cone) -> bool:
    """Take a factor back through one value; False, with the reason in the cone, where it cannot pass."""
    if node in cone.inner or node in cone.leaves:
        return True
    found = edit.product(node)
    if found is not None:
        cone.leaves[node] = found
        cone.reached = True
        return True
    if len(cone.inner) > _LIMIT or node.op != "call_function":
        cone.reason = cone.reason or f"it leads to '{node.name}', which no linear makes"
        return False
    cone.inner[node] = None
    first = node.args[0] if node.args else None
    if moves(node) or is_cast(node) or node.target is aten.neg.default or number_of(node) is not None:
        return isinstance(first, fx.Node) and _push(edit, first, cone)
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(node.args[1], fx.Node):
        return isinstance(first, fx.Node) and _push(edit, first, cone) and _push(edit, node.args[1], cone)
    if node.target in (aten.cat.default, aten.stack.default):
        return all(isinstance(part, fx.Node) and _push(edit, part, cone) for part in first)  # type: ignore[union-attr]
    if node.target in (aten.mul.Tensor, aten.matmul.default, aten.bmm.default):
        return _push_one(edit, node, cone)
    cone.reason = cone.reason or f"'{node.name}' stands between it and the linear"
    return False


def _push_one(edit: Edit, node: fx.Node, cone: _Cone) -> bool:
    """Into one factor of a product, the first that works."""
    failed = ""
    for operand in node.args[:2]:
        trial = cone.copy()
        if isinstance(operand, fx.Node) and _push(edit, operand, trial) and _serves(edit, trial):
            cone.inner, cone.leaves, cone.reached = trial.inner, trial.leaves, True
            return True
        failed = failed or trial.reason
        cone.reached = cone.reached or trial.reached
    cone.reason = cone.reason or failed
    return False


def _serves(edit: Edit, cone: _Cone) -> bool:
    for site, use in cone.leaves.values():
        reason = edit.plain(use) or edit.exclusive(site, (use,))
        if reason:
            cone.reason = cone.reason or f"'{site.name}' cannot take it: {reason}"
            return False
    return True


def _closed(edit: Edit, cone: _Cone, root: fx.Node) -> bool:
    """Whether everything that is multiplied ends in the factor alone, rows of packed linears apart."""
    if not cone.leaves or not _serves(edit, cone):
        cone.reason = cone.reason or "it leads to no linear"
        return False
    for leaf in cone.leaves:
        inside, outside = _rows(leaf, cone, root)
        if inside & outside:
            other = next(s.node for s in sinks_of(leaf) if not _within(s.node, s.value, cone, root))
            cone.reason = f"'{other.name}' reads '{cone.leaves[leaf][0].name}' without the factor"
            return False
    for node in cone.inner:
        strays = [u for u in node.users if u is not root and u not in cone.inner]
        if strays and not (moves(node) and origin_of(node) in cone.leaves):  # movements of linears were judged by rows
            cone.reason = f"'{strays[0].name}' reads '{node.name}' without the factor"
            return False
    return True


def _within(node: fx.Node, value: fx.Node, cone: _Cone, root: fx.Node) -> bool:
    return (node is root or node in cone.inner) and (value in cone.inner or value in cone.leaves)


def _rows(leaf: fx.Node, cone: _Cone, root: fx.Node) -> tuple[set[int], set[int]]:
    """Features of a linear that end within the cone, and those that end outside."""
    inside, outside = set[int](), set[int]()
    for sink in sinks_of(leaf):
        rows = set(torch.unique(sink.index).tolist())
        if _within(sink.node, sink.value, cone, root):
            inside |= rows
        else:
            outside |= rows
    return inside, outside


def _fold(edit: Edit, cone: _Cone, factor: float, root: fx.Node) -> None:
    for leaf, (site, use) in cone.leaves.items():
        inside, _ = _rows(leaf, cone, root)
        matrix, bias = (None if m is None else _scaled(m, inside, factor) for m in (edit.matrix(use), edit.bias(use)))
        with edit.graph.inserting_before(use.node):
            new = edit.linear(site, use, use.x, matrix, bias)
        edit.replace(use.node, new)


def _scaled(made: Derivation, rows: set[int], factor: float) -> Derivation:
    pieces, at = [], 0
    for start, stop in ranges_of(rows):
        if at < start:
            pieces.append(made.rows((at, start)))
        pieces.append(made.rows((start, stop)).scale(factor))
        at = stop
    if at < made.shape[0]:
        pieces.append(made.rows((at, made.shape[0])))
    return Derivation.cat(*pieces)
