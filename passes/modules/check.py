"""Whether smaller blocks compute what their fits stand for, on what flows into them in the program as it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.modules.apply import Smaller
from recast.passes.modules.form import Fit
from recast.passes.modules.marks import BLOCK, END
from recast.passes.report import fidelity
from recast.patterns.errors import VerificationError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program

__all__ = ["check_blocks"]


class _Kept(fx.Interpreter):
    """Runs a program and keeps some values by name."""

    def __init__(self, program: Program, names: set[str]) -> None:
        super().__init__(program.module)
        self.names = names
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
        return value


class _Blocks(fx.Interpreter):
    """Runs what is part of a block; all else has the values of the program as it was."""

    def __init__(self, program: Program, known: Mapping[str, Any]) -> None:
        super().__init__(program.module)
        self.known = known
        self.ends: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return super().run_node(n)
        if BLOCK in n.meta:
            value = super().run_node(n)
            if END not in n.meta:
                return value
            self.ends[n] = value
            return self.known[n.meta[END]]  # what follows starts from what it would get
        return self.known.get(n.name)


class _StoodIn(fx.Interpreter):
    """Runs the last products of experts with the matrices that fits stand for, on what flowed into them."""

    def __init__(self, program: Program, fits: Iterable[Fit], ends: set[str]) -> None:
        super().__init__(program.module)
        self.weights: dict[str, Tensor] = {}
        for fit in fits:
            for name, operator in fit.stand_ins.items():
                place = fit.places[name]
                if place.weight not in self.weights:
                    self.weights[place.weight] = program.weights[place.weight].clone()
                place.of(self.weights[place.weight]).copy_(operator.to_dense())
        self.inside: set[fx.Node] = set()
        self.wanted: set[str] = set()
        for node in program.graph.nodes:
            reads = node.all_input_nodes
            fresh = any((n in self.inside and n.name not in ends) or n.target in self.weights for n in reads)
            if node.op == "call_function" and fresh:
                self.inside.add(node)
                self.wanted |= {n.name for n in reads if n.op != "get_attr"}
        self.known: Mapping[str, Any] = {}
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self.weights[n.target] if n.target in self.weights else super().run_node(n)
        if n not in self.inside:
            return self.known.get(n.name)
        value = super().run_node(n)
        self.found[n.name] = value
        return value


def check_blocks(before: Program, after: Program, probe: list[Any], smaller: Smaller, bound: float) -> None:
    """Each block must compute what its fit stands for: the fit's form of the last linear, on what that linear took.

    For experts, the model's own product is run with the matrices of their fits. Of queries and keys, those features must be left
    that the fit keeps, as they were.

    Parameters
    ----------
    before, after
        Around `apply_modules`, whose marks `after` carries.
    probe
        Inputs.
    smaller
        What was fitted.
    bound
        Relative difference that rounding may make.

    Raises
    ------
    VerificationError
        Naming the block.
    """
    inside = [node for node in after.graph.nodes if BLOCK in node.meta]
    ends = [node for node in inside if END in node.meta]
    uses = {use.node.name: use for site in find_linear(before)[0] for use in site.uses}
    experts = {node for node in ends if smaller.fits[node.meta[BLOCK]].stand_ins}
    stood_in = _StoodIn(before, smaller.fits.values(), {node.meta[END] for node in experts})
    outputs = {n: uses[n.meta[END]] for n in ends if n.meta[END] not in smaller.taken and n not in experts}
    wanted = {n.name for node in inside for n in node.all_input_nodes if BLOCK not in n.meta}
    wanted |= {node.meta[END] for node in ends} | {use.x.name for use in outputs.values()}
    wanted |= {use.bias.name for use in outputs.values() if use.bias is not None}
    wanted |= stood_in.wanted
    with torch.no_grad():
        known = _Kept(before, wanted)
        known.run(*(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in probe))
        blocks = _Blocks(after, known.values)
        blocks.run(*probe)
        if experts:
            stood_in.known = known.values
            stood_in.run(*probe)
        for node in ends:
            found, name = blocks.ends[node], node.meta[END]
            if node in outputs:
                use, stand_in = outputs[node], smaller.fits[node.meta[BLOCK]].stand_in
                assert stand_in is not None
                expected = stand_in.apply(known.values[use.x.name])
                found = found if use.bias is None else found - known.values[use.bias.name]
            elif node in experts:
                expected = stood_in.found[name]
            else:
                whole = known.values[name]
                expected = whole[smaller.taken[name].expand(whole.shape)]
                if expected.numel() == found.numel():
                    expected = expected.view(found.shape)
            error = fidelity(expected, found)["relative_error"] if expected.shape == found.shape else math.inf
            if not error <= bound:
                raise VerificationError(
                    f"block '{node.meta[BLOCK]}' computes something else than it was fitted to: '{name}' differs by "
                    f"{error:.3g} (relative), rounding may cause {bound:.3g}"
                )
