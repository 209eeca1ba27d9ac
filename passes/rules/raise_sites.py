"""Raise: spell the chosen products as `aten.linear` with arrangement around it, whatever way the model wrote them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import fx

from recast.passes.base import Context, Pass, Soundness
from recast.passes.exact import Edit
from recast.passes.plan import targets_of
from recast.passes.remains import Kept, Remains, path_of, remains_of, runs_of
from recast.patterns.derivation import Derivation
from recast.patterns.program import Program
from recast.patterns.sites import Use

__all__ = ["RaiseSites"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RaiseSites(Pass):
    """``y = contraction(x, W) + b  ->  y = arrange'(linear(arrange(x), matrix(W), b))`` at every planned site.

    Each linear that stands for a planned site is marked with its name and parts, ``node.meta["recast_site"]`` and ``recast_parts``, and
    with ``recast_rows`` if it is computed on more rows than are sent to it. Where the model decides which
    expert's matrix a row meets, every planned expert is computed on all rows, and a row keeps what its own expert gave:
    ``y = where(number == e, linear(x, W_e), y)``. That is right for any routing and needs no shapes that depend on it, but for E
    experts it takes E times the arithmetic of the routed product.

    Matrices that stay dense beside planned ones of the same parameter move to a smaller one of their own, so that the large one
    goes; a routed product then runs over those alone. Rows of planned experts pass through it with another's matrix, and what
    that gives is thrown away. Where it cannot be done the parameter stays, which plan and report note.
    """

    name: ClassVar[str] = "raise_sites"
    soundness: ClassVar[Soundness] = Soundness.EXACT
    ensures: ClassVar[tuple[str, ...]] = ("sites raised",)

    def run(self, program: Program, context: Context) -> Program:
        """Raise the sites that the context's plan speaks of."""
        edit = Edit(program, self.name)
        names = context.plan.entries
        planned = {
            site.name
            for site in edit.sites
            if site.name in names or any(f"{site.name}.{p.name}" in names for p in site.parts)
        }
        left = remains_of(edit.sites, planned, edit.constants)
        targets = targets_of(edit.sites, edit.constants, None)
        context.notes["kept"] = Kept.of(
            left, edit.sites, {name: targets[name].matrix.nbytes for name in names if name in targets}
        )
        rests = {found.weight: _rest(edit, found, context) for found in left if found.numbers and not found.reason}
        products: dict[fx.Node, list[tuple[str, Use]]] = {}
        for site in edit.sites:
            for use in site.uses:
                products.setdefault(use.product, []).append((site.name, use))
        raised = 0
        # Backwards: a product may read another, whose node is gone once it is raised.
        for uses in sorted(products.values(), key=lambda uses: -edit.position[uses[0][1].node]):
            if any(name in planned for name, _ in uses):
                raised += _raise(edit.graph, uses, planned, rests)
        parts = {site.name: site.parts for site in edit.sites}
        for node in edit.graph.nodes:
            if (name := node.meta.get("recast_site")) is not None:
                node.meta["recast_parts"] = parts[name]
        result = edit.finish()
        context.notes[self.name] = f"{raised} products raised"
        return result


@dataclasses.dataclass(frozen=True)
class _Rest:
    """The matrices of a parameter that stay dense, as a parameter of their own.

    Parameters
    ----------
    insert
        Inserts a value of it.
    numbers
        Which of the old one's they are.
    """

    insert: Callable[[], fx.Node]
    numbers: tuple[int, ...]

    def of(self, graph: fx.Graph, weight: fx.Node) -> fx.Node:
        """Insert what takes the place of a stack made of the old parameter."""
        _, *steps = path_of(weight)
        node = self.insert()
        for step in steps:
            source = node
            node = graph.node_copy(step, lambda _, source=source: source)  # type: ignore[misc]
            node.meta.pop("val", None)
        return node


def _rest(edit: Edit, left: Remains, context: Context) -> _Rest:
    """Make the smaller parameter, and let products that pick their matrices by number pick them there."""
    held = edit.weights[left.weight]
    formula = Derivation.weight(left.weight, held.shape).rows(*runs_of(left.numbers))
    edit.values[formula] = context.cache.slices(held, left.numbers, where=left.weight)
    rest = _Rest(lambda: edit.weight(f"{left.weight}_rest", formula, held), left.numbers)
    for pick, numbers in left.picks.items():
        start = left.numbers.index(numbers.start)
        with edit.graph.inserting_before(pick):
            if pick.target is aten.slice.Tensor:
                new = edit.graph.call_function(aten.slice.Tensor, (rest.insert(), 0, start, start + len(numbers)))
            else:
                new = edit.graph.call_function(aten.select.int, (rest.insert(), 0, start))
        edit.replace(pick, new)
    return rest


def _raise(graph: fx.Graph, uses: list[tuple[str, Use]], planned: set[str], rests: Mapping[str, _Rest]) -> int:
    name, first = uses[0]
    rest = rests.get(str(path[0].target)) if (path := path_of(first.weight)) else None
    if all(site in planned for site, _ in uses):
        rest = None
    if first.product.target is aten.linear.default and first.node is first.product and first.addend is None:
        first.product.meta["recast_site"] = name
        return 1
    if first.routing is not None:
        return _raise_routed(graph, uses, planned, rest)
    contraction = first.contraction
    sizes = dict(zip(contraction.w, first.weight_shape, strict=True))
    origin = {k: v for k, v in first.node.meta.items() if k != "val"}
    with graph.inserting_before(first.node):
        results = []
        others = None if rest is None else rest.of(graph, first.weight)
        for site, use in uses:
            x = first.x
            if paired := contraction.paired:
                order = [contraction.x.index(d) for d in paired + "".join(d for d in contraction.x if d not in paired)]
                x = graph.call_function(aten.permute.default, (x, order)) if order != sorted(order) else x
                if len(paired) > 1:
                    x = graph.call_function(aten.flatten.using_ints, (x, 0, len(paired) - 1))
                x = graph.call_function(aten.select.int, (x, 0, use.index))
            x = contraction.emit_input(graph, x, contraction.batch)
            if rest is not None and others is not None and site not in planned:
                shape = (len(rest.numbers), *use.weight_shape[1:])
                number = rest.numbers.index(use.index or 0)
                matrix = _matrix(graph, dataclasses.replace(use, weight=others, weight_shape=shape, index=number))
            else:
                matrix = _matrix(graph, use)
            linear = graph.call_function(aten.linear.default, (x, matrix, use.bias))
            linear.meta = dict(origin)
            if site in planned:
                linear.meta["recast_site"] = site
            results.append(contraction.emit_output(graph, linear, sizes, contraction.batch))
        y = results[0]
        if contraction.batch:
            y = _stack(graph, results, first, sizes)
        if first.addend is not None:
            y = graph.call_function(aten.add.Tensor, (y, first.addend))
    first.node.replace_all_uses_with(y)
    graph.erase_node(first.node)
    return len(uses)


def _raise_routed(graph: fx.Graph, uses: list[tuple[str, Use]], planned: set[str], rest: _Rest | None) -> int:
    """Spell a product with experts as a linear for each planned one; the others stay in the product as it was written."""
    first = uses[0][1]
    routing, contraction = first.routing, first.contraction
    assert routing is not None
    sizes = dict(zip(contraction.w, first.weight_shape, strict=True))
    origin = {k: v for k, v in first.node.meta.items() if k != "val"}
    chosen = [(site, use) for site, use in uses if site in planned]
    with graph.inserting_before(first.node):
        numbers = _numbers(graph, first)
        x = contraction.emit_input(graph, first.x)
        y = _among_others(graph, first, rest) if len(chosen) < len(uses) else None
        among = y is not None  # the product as it was written adds its addend itself
        for site, use in chosen:
            linear = graph.call_function(aten.linear.default, (x, _matrix(graph, use), use.bias))
            linear.meta = {**origin, "recast_site": site, "recast_rows": routing.count}
            own = contraction.emit_output(graph, linear, sizes)
            for i, letter in enumerate(routing.y):
                if letter not in contraction.y:
                    own = graph.call_function(aten.unsqueeze.default, (own, i))
            if among and first.addend is not None:
                own = graph.call_function(aten.add.Tensor, (own, first.addend))
            mine = graph.call_function(aten.eq.Scalar, (numbers, use.index))
            if y is None:
                y = graph.call_function(aten.where.ScalarOther, (mine, own, 0))
            else:
                y = graph.call_function(aten.where.self, (mine, own, y))
        assert y is not None
        if first.addend is not None and not among:
            y = graph.call_function(aten.add.Tensor, (y, first.addend))
    first.node.replace_all_uses_with(y)
    graph.erase_node(first.node)
    return len(chosen)


def _among_others(graph: fx.Graph, use: Use, rest: _Rest | None) -> fx.Node:
    """The product as it was written, over the matrices that stay; rows that meet none of them meet any."""
    if rest is None:
        return graph.node_copy(use.product)
    routing = use.routing
    assert routing is not None
    runs = runs_of(rest.numbers)
    index: fx.Node
    if routing.kind == "grouped":  # rows between the runs of two that stay belong to the second's run
        ends = [graph.call_function(aten.slice.Tensor, (routing.index, 0, start, stop)) for start, stop in runs]
        index = ends[0] if len(ends) == 1 else graph.call_function(aten.cat.default, (ends,))
    else:
        index = number = graph.call_function(aten.remainder.Scalar, (routing.index, routing.count))
        # Each number less those below it that go; of a matrix that goes itself, the next one's.
        starts, stops = [0, *(stop for _, stop in runs)], [*(start for start, _ in runs), routing.count]
        for start, stop in ((a, b) for a, b in zip(starts, stops, strict=True) if a < b):
            beyond = graph.call_function(aten.sub.Tensor, (number, start))
            gone = graph.call_function(aten.clamp.default, (beyond, 0, stop - start))
            index = graph.call_function(aten.sub.Tensor, (index, gone))
        index = graph.call_function(aten.clamp.default, (index, 0, len(rest.numbers) - 1))
    now = {use.weight: rest.of(graph, use.weight), routing.index: index}
    for node in routing.nodes:
        now[node] = graph.node_copy(node, lambda n: now.get(n, n))
    return graph.node_copy(use.product, lambda n: now.get(n, n))


def _numbers(graph: fx.Graph, use: Use) -> fx.Node:
    """The number of the matrix that each row meets, shaped to stand beside the result."""
    routing = use.routing
    assert routing is not None
    if routing.kind == "grouped":  # a row comes after the ends of all runs before its own
        ends = graph.call_function(aten.unsqueeze.default, (routing.index, 0))
        count = graph.call_function(aten.sym_size.int, (use.x, 0))
        device = use.x.meta["val"].device
        rows = graph.call_function(aten.arange.default, (count,), {"device": device, "pin_memory": False})
        passed = graph.call_function(aten.ge.Tensor, (graph.call_function(aten.unsqueeze.default, (rows, 1)), ends))
        numbers = graph.call_function(aten.sum.dim_IntList, (passed, [1]))
    else:  # a negative number counts from the last matrix
        numbers = graph.call_function(aten.remainder.Scalar, (routing.index, routing.count))
    order = sorted(range(len(routing.letters)), key=lambda k: routing.y.index(routing.letters[k]))
    if order != sorted(order):
        numbers = graph.call_function(aten.permute.default, (numbers, order))
    for i, letter in enumerate(routing.y):
        if letter not in routing.letters:
            numbers = graph.call_function(aten.unsqueeze.default, (numbers, i))
    return numbers


def _matrix(graph: fx.Graph, use: Use) -> fx.Node:
    """Nodes that bring the weight to ``(out_features, in_features)``."""
    contraction, node = use.contraction, use.weight
    sizes = dict(zip(contraction.w, use.weight_shape, strict=True))
    if use.routing is not None:
        node = graph.call_function(aten.select.int, (node, 0, use.index))
    elif "val" in node.meta and tuple(node.meta["val"].shape) != use.weight_shape:
        node = graph.call_function(aten.reshape.default, (node, list(use.weight_shape)))
    order = contraction.matrix_order()
    if order != sorted(order):
        node = graph.call_function(aten.permute.default, (node, order))
    out_features = math.prod(sizes[d] for d in contraction.outputs)
    in_features = math.prod(sizes[d] for d in contraction.inputs)
    if len(use.weight_shape) != 2:
        node = graph.call_function(aten.reshape.default, (node, [-1, out_features, in_features]))
        node = graph.call_function(aten.select.int, (node, 0, 0 if use.routing is not None else use.index or 0))
    return node


def _stack(graph: fx.Graph, results: list[fx.Node], use: Use, sizes: dict[str, int]) -> fx.Node:
    contraction = use.contraction
    y = graph.call_function(aten.stack.default, (results, 0))
    if len(contraction.batch) > 1:
        y = graph.call_function(aten.unflatten.int, (y, 0, [sizes[d] for d in contraction.batch]))
    have = contraction.batch + "".join(d for d in contraction.y if d not in contraction.batch)
    order = [have.index(d) for d in contraction.y]
    return y if order == sorted(order) else graph.call_function(aten.permute.default, (y, order))
