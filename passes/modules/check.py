"""Whether smaller blocks compute what their fits stand for, on what flows into them in the program as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.modules.apply import Smaller
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


def check_blocks(before: Program, after: Program, probe: list[Any], smaller: Smaller, bound: float) -> None:
    """Each block must compute what its fit stands for: the fit's form of the last linear, on what that linear took.

    Of queries and keys, those features must be left that the fit keeps, as they were.

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
    outputs = {node: uses[node.meta[END]] for node in ends if node.meta[END] not in smaller.taken}
    wanted = {n.name for node in inside for n in node.all_input_nodes if BLOCK not in n.meta}
    wanted |= {node.meta[END] for node in ends} | {use.x.name for use in outputs.values()}
    wanted |= {use.bias.name for use in outputs.values() if use.bias is not None}
    with torch.no_grad():
        known = _Kept(before, wanted)
        known.run(*(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in probe))
        blocks = _Blocks(after, known.values)
        blocks.run(*probe)
        for node in ends:
            found, name = blocks.ends[node], node.meta[END]
            if node in outputs:
                use, stand_in = outputs[node], smaller.fits[node.meta[BLOCK]].stand_in
                assert stand_in is not None
                expected = stand_in.apply(known.values[use.x.name])
                found = found if use.bias is None else found - known.values[use.bias.name]
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
