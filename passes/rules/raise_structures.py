"""Raise structures: norms, rotary embeddings, attention ... as one operation of the dialect each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from torch import fx

from recast.passes.base import Context, Pass, Soundness
from recast.passes.dead import remove_dead
from recast.passes.meta import propagate
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.rules import rules
from recast.patterns.sites import Site

__all__ = ["RaiseStructures", "raise_program"]


@dataclasses.dataclass(frozen=True)
class RaiseStructures(Pass):
    """``what a site matched -> operation(operands)`` for every recognised site whose rule has an operation in the dialect.

    Parameters
    ----------
    kinds
        Kinds of sites to raise, joined by ``+`` (``norm+rotary``); by default all.
    """

    name: ClassVar[str] = "raise_structures"
    soundness: ClassVar[Soundness] = Soundness.EXACT
    ensures: ClassVar[tuple[str, ...]] = ("structures raised",)

    kinds: str = "all"

    def run(self, program: Program, context: Context) -> Program:
        """Raise a copy of the program."""
        kinds = None if self.kinds == "all" else frozenset(self.kinds.split("+"))
        result, raised = _raised(program, kinds)
        context.notes[self.name] = ", ".join(f"{n} {kind}" for kind, n in raised.items()) or "nothing to raise"
        return result


def raise_program(program: Program, kinds: Collection[str] | None = None) -> Program:
    """A program in which every recognised structure is one operation of the dialect.

    Parameters
    ----------
    program
        Not changed.
    kinds
        Kinds of sites to raise; by default all.

    Returns
    -------
    Program
        Computes the same: only rounding may differ.

    Examples
    --------
    >>> import torch
    >>> from recast.patterns.capture.export import capture
    >>> program = capture(torch.nn.LayerNorm(8).eval(), (torch.randn(3, 8),))
    >>> [node.target.__name__ for node in raise_program(program).graph.nodes if node.op == "call_function"]
    ['layer_norm']
    """
    return _raised(program, None if kinds is None else frozenset(kinds))[0]


def _raised(program: Program, kinds: frozenset[str] | None) -> tuple[Program, Counter[str]]:
    result = program.copy()
    # Kinds that come later are of no use; those that come before are: attention knows the norms it reads.
    last = max((rule.order for rule in rules() if kinds is None or rule.kind in kinds), default=-1)
    tried = [rule for rule in rules() if rule.order <= last]
    emitters = {(rule.kind, rule.name): rule.emit for rule in tried if rule.emit is not None}
    raised: Counter[str] = Counter()
    again = True
    while again:  # what stays of a structure because something else reads it too may be a smaller one
        replaced: dict[fx.Node, fx.Node] = {}
        inside: set[fx.Node] = set()
        for site in recognise(result, only=tried).sites:
            emit = emitters.get((site.kind, getattr(site, "pattern", "")))
            if emit is None or (kinds is not None and site.kind not in kinds):
                continue
            operation = emit(site)
            if operation is not None:
                _replace(result.graph, site, operation, replaced)
                inside.update(n for n in getattr(site, "nodes", ()) if n.op == "call_function")
                raised[site.kind] += 1
        remove_dead(result.graph)
        propagate(result)
        again = not inside.isdisjoint(result.graph.nodes)
    result.graph.lint()
    result.module.recompile()
    return result, raised


def _replace(
    graph: fx.Graph,
    site: Site,
    operation: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    replaced: dict[fx.Node, fx.Node],
) -> None:
    """Put the operation where the site's value is computed; what was raised before is read in its raised form."""
    node = site.node  # type: ignore[attr-defined]
    function, args, kwargs = operation
    args, kwargs = fx.node.map_arg((args, kwargs), lambda n: replaced.get(n, n))
    with graph.inserting_before(node):
        call = graph.call_function(function, args, kwargs)
    call.meta = dict(node.meta)  # its type among it: verification holds the operation to it
    call.meta["recast_raised"] = site.name
    node.replace_all_uses_with(call)
    replaced[node] = call
