"""Numbered layers of a program in a row, and the head behind them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from recast.passes.follow import is_cast, moves
from recast.patterns.errors import CalibrationError
from recast.patterns.program import Program, fixed_size
from recast.patterns.sites import LinearSite

__all__ = ["Chain", "layers_in_a_row"]

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
_REMEDY = (
    "a model of numbered layers, each reading what the one before gives, and a head (a language model or a classifier "
    "captured with it, as AutoModelForCausalLM or AutoModelForMaskedLM load one) would work; without drift, shared forms take "
    "across='layers'"
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Numbered layers of a program in a row.

    Parameters
    ----------
    names
        Of the layers.
    outputs
        What each gives, the only value through which it reaches the logits.
    head
        Nodes after the last output up to the logits, with the constants they read, in order.
    given
        Sizes and masks that the head reads and that follow from the inputs alone.
    logits
        The last node of the head.
    """

    names: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    head: tuple[fx.Node, ...]
    given: frozenset[fx.Node]
    logits: fx.Node

    @property
    def one_is_enough(self) -> bool:
        """Whether the head gives for one token what it gives for several: it leaves none out and reads nothing besides."""
        read = {str(size) for size in self.outputs[-1].meta["val"].shape}
        told = self.logits.meta["val"].shape[:-1]
        return not self.given and all(fixed_size(size) is not None or str(size) in read for size in told)


class _NoChain(Exception):
    """Why layers are no chain."""


def layers_in_a_row(program: Program, sites: Sequence[LinearSite]) -> Chain:
    """Find the numbered layers of a program that hand one value on from each to the next, and the head that gives logits.

    Parameters
    ----------
    program
        As captured: module names, and those of weights, tell which layer a value belongs to.
    sites
        Its linear sites; one of them must give the logits.

    Raises
    ------
    CalibrationError
        There are no such layers, or what follows them does not end in logits.

    Examples
    --------
    >>> from torch import nn
    >>> from recast.patterns.capture.export import capture
    >>> from recast.patterns.linear.find import find_linear
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    ...         self.head = nn.Linear(4, 9)
    ...
    ...     def forward(self, x):
    ...         for layer in self.layers:
    ...             x = x + layer(x)
    ...         return self.head(x)
    >>> program = capture(Model().eval(), (torch.randn(2, 3, 4),))
    >>> layers_in_a_row(program, find_linear(program)[0]).names
    ('layers.0', 'layers.1', 'layers.2')
    """
    products = {use.product for site in sites for use in site.uses}
    values = _Values(program)
    outputs = [n for n in program.outputs(list(program.graph.output_node().args[0])) if isinstance(n, fx.Node)]  # type: ignore[arg-type]
    scores = next((n for n in outputs if values.product_of(n, products) is not None), None)
    if scores is None:
        raise CalibrationError(
            f"calibration: the drift of layers is measured on logits, and no output of {program.label} is what a last linear "
            f"gives ({_told(outputs)}); {_REMEDY}"
        )
    families = _families(values.activations)
    reasons = []
    found: list[Chain] = []
    for prefix, labels in families.items():
        try:
            found.append(values.chain(prefix, labels, scores, products))
        except _NoChain as reason:
            reasons.append(f"'{prefix or '*'}': {reason}")
    if not found:
        told = "; ".join(reasons) or "no modules that differ in a number, such as layers.0 and layers.1"
        raise CalibrationError(
            f"calibration: the drift of layers needs layers in a row, {program.label} has none ({told}); {_REMEDY}"
        )
    return max(found, key=lambda chain: (len(chain.names), -len(chain.head)))


def _told(outputs: list[fx.Node]) -> str:
    return ", ".join(f"{n.target} in '{_place(n)}'" if _place(n) else str(n.target) for n in outputs[:3])


def _place(node: fx.Node) -> str:
    """Module that a node was computed in, or whose weight it reads."""
    stack = [re.sub(r"@\d+", "", str(entry[0])) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    inner = stack[-1] if stack and not stack[-1].startswith("_empty") else ""
    owners = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
    # A module that uses a weight of another inside it, or a node that does not tell.
    return next((owner for owner in owners if owner.startswith(f"{inner}." if inner else "")), inner)


def _families(nodes: Sequence[fx.Node]) -> dict[str, dict[fx.Node, int]]:
    """Numbers of the layers that nodes belong to, by what stands before the number; the outermost number counts."""
    found: dict[str, dict[fx.Node, int]] = {}
    for node in nodes:
        parts = _place(node).split(".")
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if at is not None and node.op == "call_function":
            found.setdefault(".".join(parts[:at]), {})[node] = int(parts[at])
    return {prefix: labels for prefix, labels in found.items() if len(set(labels.values())) > 1}


class _Values:
    """What the values of a program depend on."""

    def __init__(self, program: Program) -> None:
        self.order = list(program.graph.nodes)
        self.weighed: set[fx.Node] = set()  # floating values of the model's own, or made of some
        self.data: set[fx.Node] = set()  # from the inputs
        self.floating: set[fx.Node] = set()  # from floating inputs
        for node in self.order:
            kind = node.meta.get("val")
            for held in (self.weighed, self.data, self.floating):
                if any(n in held for n in node.all_input_nodes) and not isinstance(kind, int | torch.SymInt):
                    held.add(node)
            if node.op == "get_attr" and isinstance(kind, Tensor) and kind.is_floating_point():
                self.weighed.add(node)
            if node.op == "placeholder":
                self.data.add(node)
                if isinstance(kind, Tensor) and kind.is_floating_point():
                    self.floating.add(node)
            if any(n in self.data for n in node.all_input_nodes):
                self.data.add(node)  # sizes, too
        active = self.data & (self.floating | self.weighed)
        self.activations = [node for node in self.order if node in active and node.op != "output"]
        self._active = active

    def product_of(self, node: fx.Node, products: set[fx.Node]) -> fx.Node | None:
        """The product that a value is but for movements, casts, biases, scaling by a number and a soft cap."""
        scaled = False
        while node not in products:
            read = [n for n in node.all_input_nodes if n in self._active]
            others = [n for n in node.args[:2] if n not in read]
            number = all(not isinstance(n, fx.Node) or _is_number(n) for n in others)
            capped = node.target is aten.tanh.default and scaled
            if len(read) != 1 or not (
                moves(node)
                or (_takes_rows(node) and node.args[0] is read[0])
                or is_cast(node)
                or node.target in _SUMS
                or (node.target in _SCALES and number)
                or capped
            ):
                return None
            scaled = scaled or node.target in _SCALES
            node = read[0]
        return node

    def chain(self, prefix: str, labels: Mapping[fx.Node, int], scores: fx.Node, products: set[fx.Node]) -> Chain:
        """Layers of one family in a row, or the reason why they are none."""
        needed = _behind([scores])
        numbers = sorted({labels[n] for n in labels if n in needed})
        if len(numbers) < 2:
            raise _NoChain("less than two of its layers reach the logits")
        names = tuple(f"{prefix}.{number}" if prefix else str(number) for number in numbers)
        # What several later layers read (a bias of positions made in the first) is not what one hands to the next.
        order = [n for n in self.activations if n in needed and len(_later(n, labels)) < 2]
        last = _cut(order, {n for n in order if n in labels})
        size = _shape(last)
        first = [n for n in order if labels.get(n) == numbers[0]]
        # Where additions stand outside the layers, what enters the first goes on beside it.
        entering = {n for n in _behind(first) & set(order) if n not in labels and _shape(n) == size} if size else set()
        outputs: list[fx.Node] = []
        for number, name in zip(numbers, names, strict=True):
            node = _cut(order, entering | {n for n in order if labels.get(n, numbers[-1] + 1) <= number})
            own = node is not None and node not in outputs and labels.get(node, number) == number
            if node is None or not own or _shape(node) != size or node.meta["val"].ndim < 2:
                raise _NoChain(f"what '{name}' gives does not go on as one value, of the shape that the last one gives")
            outputs.append(node)
        head = _behind([scores], outputs[-1]) - {outputs[-1]}
        after = {outputs[-1]}
        for node in self.order:
            if any(n in after for n in node.all_input_nodes):
                after.add(node)
        if self.product_of(scores, products) not in after:
            raise _NoChain("no linear follows the last one")
        given = frozenset(n for n in head if n not in after and n in self.data)
        read_too = {n for n in given if any(user in after and user in head for user in n.users)}
        if beside := [n for n in read_too if n in self._active]:
            raise _NoChain(f"what follows the last one reads '{beside[0].name}' besides, which is no mask and no size")
        run = tuple(n for n in self.order if n in head and n not in given)
        return Chain(names, tuple(outputs), run, frozenset(read_too), scores)


def _takes_rows(node: fx.Node) -> bool:
    """Whether a node takes whole vectors of its operand, where numbers from elsewhere say (the last token that counts)."""
    if node.target is aten.index_select.default:
        return bool(node.args[1] not in (-1, node.args[0].meta["val"].ndim - 1))  # type: ignore[union-attr]
    return node.target is aten.index.Tensor and len(node.args[1]) < node.args[0].meta["val"].ndim  # type: ignore[union-attr, arg-type]


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or fixed_size(value.numel()) == 1


def _shape(node: fx.Node | None) -> str:
    value = node.meta.get("val") if node is not None else None
    return str(tuple(value.shape)) if isinstance(value, Tensor) else ""


def _behind(nodes: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
    """Some values and everything they are computed from, not looking behind `stop`."""
    found = set(nodes)
    todo = list(found)
    while todo:
        at = todo.pop()
        for operand in at.all_input_nodes if at is not stop else ():
            if operand not in found:
                found.add(operand)
                todo.append(operand)
    return found


def _later(node: fx.Node, labels: Mapping[fx.Node, int]) -> set[int]:
    own = labels.get(node)
    return {labels[user] for user in node.users if user in labels and labels[user] != own}


def _cut(order: Sequence[fx.Node], sources: set[fx.Node]) -> fx.Node | None:
    """The first value through which all that follows from some sources goes on, they included."""
    place = {node: k for k, node in enumerate(order)}
    last = max((place[node] for node in sources), default=len(order))
    reached, after = -1, set[fx.Node]()
    for k, node in enumerate(order):
        if node not in sources and not any(n in after for n in node.all_input_nodes):
            continue
        value = node.meta.get("val")
        if k >= last and reached <= k and isinstance(value, Tensor) and value.is_floating_point():
            return node
        after.add(node)
        reached = max([reached, *(place[user] for user in node.users if user in place)])
    return None
