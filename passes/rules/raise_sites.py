"""Raise: spell the chosen products as `aten.linear` with arrangement around it, whatever way the model wrote them."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import fx

from recast.passes.base import Context, Pass, Soundness
from recast.passes.dead import remove_dead
from recast.passes.meta import propagate
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program
from recast.patterns.sites import Use

__all__ = ["RaiseSites"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class RaiseSites(Pass):
    """``y = contraction(x, W) + b  ->  y = arrange'(linear(arrange(x), matrix(W), b))`` at every planned site.

    Each linear that stands for a planned site is marked with ``node.meta["recast_site"]``. Where the model decides which
    expert's matrix a row meets, every planned expert is computed on all rows, and a row keeps what its own expert gave:
    ``y = where(number == e, linear(x, W_e), y)``. That is right for any routing and needs no shapes that depend on it, but for E
    experts it takes E times the arithmetic of the routed product.
    """

    name: ClassVar[str] = "raise_sites"
    soundness: ClassVar[Soundness] = Soundness.EXACT
    ensures: ClassVar[tuple[str, ...]] = ("sites raised",)

    def run(self, program: Program, context: Context) -> Program:
        """Raise the sites that the context's plan speaks of."""
        result = program.copy()
        sites, _ = find_linear(result)
        planned = {
            site.name
            for site in sites
            if site.name in context.plan.entries
            or any(f"{site.name}.{p.name}" in context.plan.entries for p in site.parts)
        }
        products: dict[fx.Node, list[tuple[str, Use]]] = {}
        for site in sites:
            for use in site.uses:
                products.setdefault(use.product, []).append((site.name, use))
        raised = 0
        # Backwards: a product may read another, whose node is gone once it is raised.
        place = {node: i for i, node in enumerate(result.graph.nodes)}
        for uses in sorted(products.values(), key=lambda uses: -place[uses[0][1].node]):
            if any(name in planned for name, _ in uses):
                raised += _raise(result.graph, uses, planned)
        remove_dead(result.graph)
        propagate(result)
        result.graph.lint()
        result.module.recompile()
        context.notes[self.name] = f"{raised} products raised"
        return result


def _raise(graph: fx.Graph, uses: list[tuple[str, Use]], planned: set[str]) -> int:
    name, first = uses[0]
    if first.product.target is aten.linear.default and first.node is first.product and first.addend is None:
        first.product.meta["recast_site"] = name
        return 1
    if first.routing is not None:
        return _raise_routed(graph, uses, planned)
    contraction = first.contraction
    sizes = dict(zip(contraction.w, first.weight_shape, strict=True))
    origin = {k: v for k, v in first.node.meta.items() if k != "val"}
    with graph.inserting_before(first.node):
        results = []
        for site, use in uses:
            x = first.x
            if paired := contraction.paired:
                order = [contraction.x.index(d) for d in paired + "".join(d for d in contraction.x if d not in paired)]
                x = graph.call_function(aten.permute.default, (x, order)) if order != sorted(order) else x
                if len(paired) > 1:
                    x = graph.call_function(aten.flatten.using_ints, (x, 0, len(paired) - 1))
                x = graph.call_function(aten.select.int, (x, 0, use.index))
            x = contraction.emit_input(graph, x, contraction.batch)
            linear = graph.call_function(aten.linear.default, (x, _matrix(graph, use), use.bias))
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


def _raise_routed(graph: fx.Graph, uses: list[tuple[str, Use]], planned: set[str]) -> int:
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
        y = graph.node_copy(first.product) if len(chosen) < len(uses) else None
        among = y is not None  # the product as it was written adds its addend itself
        for site, use in chosen:
            linear = graph.call_function(aten.linear.default, (x, _matrix(graph, use), use.bias))
            linear.meta = {**origin, "recast_site": site}
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
    elif tuple(node.meta["val"].shape) != use.weight_shape:
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
