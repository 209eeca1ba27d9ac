"""What stands between the products of a feed-forward block: the hidden values, how they are gated, by which activation."""

from __future__ import annotations

import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.linear.find import product_flops
from recast.patterns.provenance import Origin, piece_read
from recast.patterns.rules import Surroundings
from recast.patterns.sites import LinearSite, NormSite, Use

__all__ = ["ACTIVATIONS", "CASTS", "TURNS", "VIEWS", "Hidden", "Leaf", "read_hidden"]

aten = torch.ops.aten

ACTIVATIONS: frozenset[Any] = frozenset(
    {
        aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.erf.default,
        aten.hardswish.default, aten.hardsigmoid.default, aten.mish.default, aten.elu.default, aten.selu.default,
        aten.celu.default, aten.leaky_relu.default, aten.relu6.default, aten.hardtanh.default, aten.softplus.default,
        aten.log_sigmoid.default, aten.glu.default, aten.prelu.default, aten.rrelu.default, aten.silu_backward.default,
    }
)  # fmt: skip
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default,
    aten.clone.default, aten.dropout.default, aten.native_dropout.default,
}  # fmt: skip
CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}
_TAKES = {
    aten.slice.Tensor, aten.select.int, aten.narrow.default, operator.getitem, aten.split.Tensor, aten.chunk.default,
    aten.split_with_sizes.default, aten.unbind.int,
}  # fmt: skip
_PIECES = {aten.slice.Tensor, aten.select.int, aten.narrow.default, operator.getitem}
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
TURNS = {aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int}
_LIMIT = 80  # values between two products of a block


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A product, or a named part of it, that hidden values are made of.

    Attributes
    ----------
    product
        The value of the graph.
    part
        Name of the part that is read; empty for all.
    """

    product: fx.Node
    part: str

    def uses(self, around: Surroundings) -> list[tuple[LinearSite, Use]]:
        """The linear sites of which it is the product: one, or one for each matrix of a stack."""
        return around.products(self.product)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """How the input of a block's last product comes about.

    Attributes
    ----------
    gate, up
        Products that make it; no gate where the block is plain.
    activation
        Its name.
    nodes
        All values between the products.
    """

    gate: Leaf | None
    up: Leaf
    activation: str
    nodes: tuple[fx.Node, ...]


def read_hidden(
    value: fx.Node, around: Surroundings, known: Callable[[fx.Node], bool] | None = None, *, turned: bool = False
) -> Hidden | str:
    """Follow the input of a product upwards to the one or two products that it is made of.

    Parameters
    ----------
    value
        What enters the product.
    around
        Which values are products.
    known
        Values that count as constants besides weights, such as a router's.
    turned
        Go through transposes too; whoever asks for it has to look where the features are.
    """
    reader = _Reader(around, known or (lambda node: False), value, turned)
    reached = reader.leaves(value)
    if isinstance(reached, str):
        return reached
    nodes = tuple(reader.taken(value))
    if len(reached) == 1:
        name = _activation(nodes, around)
        if not name:
            return "no activation stands between the products"
        (leaf,) = reached
        if name == "glu" or reader.halves(nodes):
            return Hidden(leaf, leaf, "sigmoid" if name == "glu" else name, nodes)
        return Hidden(None, leaf, name, nodes)
    if len(reached) > 2:
        return f"what enters is made of {len(reached)} products, not one or two"
    for node in nodes:  # the last product of two branches, each made of one leaf
        if node.target is not aten.mul.Tensor:
            continue
        sides = [side for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(side := reader.leaves(a), set)]
        if [len(side) for side in sides] != [1, 1] or sides[0] == sides[1]:
            continue
        names = [_activation(tuple(reader.taken(a)), around) for a in node.args[:2]]  # type: ignore[arg-type]
        first = 0 if names[0] or not names[1] else 1
        if names[0] and names[1]:  # both are activated: the wider sense of a gate, the one that is squashed
            first = 0 if "sigmoid" in names[0] or "tanh" in names[0] or "sigmoid" not in names[1] else 1
        (gate,), (up,) = sides[first], sides[1 - first]
        if not any(names):  # (up * gate) * squash(gate): the squashed one is the gate
            squashed = [reader.leaves(n) for n in nodes if n.target in ACTIVATIONS]
            gate, up = (up, gate) if {up} in squashed else (gate, up)
            names[first] = _activation(nodes, around)
        return Hidden(gate, up, names[first] or "identity", nodes)
    return "two products enter, but are not multiplied with each other"


class _Reader:
    def __init__(
        self, around: Surroundings, known: Callable[[fx.Node], bool], value: fx.Node, turned: bool = False
    ) -> None:
        self.around, self.known, self.run = around, known, value if _one_run(value) else None
        self.turned = turned
        self._taken: dict[fx.Node, dict[fx.Node, None]] = {}

    def _norm(self, node: fx.Node) -> NormSite | None:
        return next((s for s in self.around.structures.get(node, ()) if isinstance(s, NormSite)), None)

    def leaves(self, value: fx.Node) -> set[Leaf] | str:
        """Products (or parts of them) that a value is made of, or why they cannot be told."""
        found: set[Leaf] = set()
        taken = self._taken[value] = {}
        self._from = value
        queue, seen = deque([value]), {value}
        while queue:
            node = queue.popleft()
            leaf = self._climb(node, taken)
            if leaf is not None:
                found.add(leaf)
                continue
            if (reason := self._refusal(node)) is not None:
                return reason
            taken[node] = None
            if len(taken) > _LIMIT:
                return f"more than {_LIMIT} values lie between"
            for operand in self._operands(node):
                if operand not in seen:
                    seen.add(operand)
                    queue.append(operand)
        return found or "no product leads here"

    def halves(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether rows of several experts are joined, and two takes of what is joined multiplied with each other."""
        products = [n for n in nodes if self.run is not None and n.target is aten.mul.Tensor]
        for node in products:
            sides = [a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(self.leaves(a), set)]
            takes = [{n for n in self.taken(side) if n.target in _PIECES} for side in sides]
            if len(takes) == 2 and takes[0] and takes[1] and not takes[0] & takes[1]:
                return True
        return False

    def taken(self, value: fx.Node) -> Iterable[fx.Node]:
        """Values seen on the way, the last first."""
        return self._taken[value]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        norm = self._norm(node)
        if norm is not None and norm.x is not None:
            return [norm.x]
        if (own := self._own_rows(node)) is not None:
            return [own]
        read = (
            node.args[:1] if node.target is aten.type_as.default else node.all_input_nodes
        )  # the other lends its dtype
        return [n for n in read if isinstance(n, fx.Node) and self._computed(n)]

    def _computed(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return (
            node not in self.around.scope.constants
            and not self.known(node)
            and isinstance(value, Tensor | tuple | list)
            and not (isinstance(value, Tensor) and not value.is_floating_point())
        )

    def _own_rows(self, node: fx.Node) -> fx.Node | None:
        """Of rows of all experts joined in order, those of the expert that the value is of."""
        if self.run is None or node.target is not aten.cat.default or (len(node.args) > 1 and node.args[1] != 0):
            return None
        split: Any = self.run.args[0]
        joined: Any = node.args[0]
        sizes = [size.meta["val"] if isinstance(size, fx.Node) else size for size in split.args[1]]
        if [str(n.meta["val"].shape[0]) for n in joined] != [str(size) for size in sizes]:
            return None
        rows = str(node.meta["val"].shape[0])
        between = self._taken[self._from].keys() - {self.run, split, node}
        if any(isinstance(v := n.meta.get("val"), Tensor) and v.ndim and str(v.shape[0]) != rows for n in between):
            return None
        own: fx.Node = joined[self.run.args[1]]
        return own

    def _refusal(self, node: fx.Node) -> str | None:
        if node.op != "call_function":
            return f"it is made of the input '{node.name}', not of a product"
        if product_flops(node):
            return f"'{node.name}' is a product of activations"
        target = node.target
        if target in TURNS:
            return None if self.turned else f"'{node.name}' turns dimensions between the products"
        if (
            self._own_rows(node) is not None
            or self._norm(node) is not None
            or target in _NORMS | VIEWS | CASTS | _TAKES
        ):
            return None
        if isinstance(target, torch._ops.OpOverload) and (target in ACTIVATIONS or torch.Tag.pointwise in target.tags):
            return None
        return f"'{node.name}' ({getattr(target, '_opname', target)}) stands between the products"

    def _climb(self, node: fx.Node, taken: dict[fx.Node, None]) -> Leaf | None:
        """The product that a value is, or is cut out of by views, splits and an added bias."""
        path: list[fx.Node] = []
        at = node
        while at.op == "call_function" and not self.around.products(at) and len(path) < 12:
            operands = self._operands(at)
            follows = at.target in VIEWS | CASTS | _TAKES or (at.target is aten.add.Tensor and len(operands) == 1)
            if not follows or not operands:
                return None
            path.append(at)
            at = operands[0]
        products = self.around.products(at)
        if not products:
            return None
        taken.update(dict.fromkeys(path))
        site, use = products[0]
        return Leaf(at, piece_read(Origin(site, use, path[::-1])).part)


def _one_run(value: fx.Node) -> bool:
    """Whether a value is one of several runs of rows."""
    split: Any = value.args[0] if value.target is operator.getitem else None
    return isinstance(split, fx.Node) and split.target is aten.split_with_sizes.default and len(split.args) == 2


def _activation(nodes: tuple[fx.Node, ...], around: Surroundings) -> str:
    """Name of what is applied between; empty if nothing is."""
    by_kind: dict[str, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function":
            by_kind.setdefault(str(getattr(node.target, "_opname", node.target)), node)
    kinds = set(by_kind)
    clamped = ", clamped" if kinds & {"clamp", "clamp_max", "clamp_min"} else ""
    if "glu" in kinds:
        return "glu"
    if "gelu" in kinds:
        tanh = by_kind["gelu"].kwargs.get("approximate", "none") == "tanh"
        return ("gelu_tanh" if tanh else "gelu") + clamped
    if "relu" in kinds:
        node = by_kind["relu"]
        squared = any(u.target in (aten.pow.Tensor_Scalar, aten.square.default) for u in node.users)
        twice = any(u.target is aten.mul.Tensor and u.args[0] is u.args[1] for u in node.users)
        return ("relu2" if squared or twice else "relu") + clamped
    if "erf" in kinds:
        return "gelu" + clamped
    if "tanh" in kinds:
        cubic = any(isinstance(a, float) and abs(a - 0.044715) < 1e-6 for node in nodes for a in node.args)
        return ("gelu_tanh" if cubic else "tanh") + clamped
    if "sigmoid" in kinds:
        return _of_sigmoid(by_kind["sigmoid"], around) + clamped
    named = [k for k in kinds if any(getattr(op, "_opname", "") == k for op in ACTIVATIONS)]
    return (min(named) + clamped) if named else ""


def _of_sigmoid(node: fx.Node, around: Surroundings) -> str:
    inner: Any = node.args[0]
    factor: Any = 1.0
    if isinstance(inner, fx.Node) and inner.target is aten.mul.Tensor and not isinstance(inner.args[1], fx.Node):
        inner, factor = inner.args
    for user in node.users:
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
        if user.target is aten.mul.Tensor and any(a is inner or inner in a.all_input_nodes for a in others):
            if factor == 1.0:
                return "silu"
            return "quick_gelu" if abs(float(factor) - 1.702) < 1e-3 else f"swish({factor:g})"
    return "sigmoid"
