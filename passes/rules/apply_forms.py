"""Apply: put the fitted operators in place of the raised linears."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor, fx

from recast.passes.base import Context, Pass, Soundness
from recast.passes.cache import Fitted
from recast.passes.dead import remove_dead
from recast.passes.forms.algebra import RowStack
from recast.passes.forms.operator import Dense, Operator, identity_of
from recast.passes.forms.shared import divided
from recast.passes.meta import propagate
from recast.passes.module import OperatorModule
from recast.passes.parallel import mapped
from recast.passes.plan import Target, fitted_apart, operations, targets_of
from recast.passes.progress import track
from recast.passes.report import SiteRow
from recast.patterns.constants import Constants
from recast.patterns.errors import PlanError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program, set_by_path

__all__ = ["ApplyForms", "put_module"]


@dataclasses.dataclass(frozen=True)
class ApplyForms(Pass):
    """``linear(x, W, b) -> operator(x) + b`` with the operator that the plan's form makes of W."""

    name: ClassVar[str] = "apply_forms"
    soundness: ClassVar[Soundness] = Soundness.LOSSY
    requires: ClassVar[tuple[str, ...]] = ("sites raised",)
    ensures: ClassVar[tuple[str, ...]] = ("forms applied",)

    def run(self, program: Program, context: Context) -> Program:
        """Replace every marked linear."""
        result = program.copy()
        constants = Constants(result)
        sites, _ = find_linear(result, constants)
        marked: dict[str, list[fx.Node]] = {}
        for node in result.graph.nodes:
            if (name := node.meta.get("recast_site")) is not None:
                marked.setdefault(name, []).append(node)
        by_node = {use.product: (site, use) for site in sites for use in site.uses}
        targets: dict[str, Target] = {}
        for name, nodes in marked.items():
            site, use = by_node[nodes[0]]
            # Names may shift once spelled as linear, and what takes the result apart may be out of sight behind the choice of
            # an expert; the marks hold the name and the parts that the plan speaks of.
            site = dataclasses.replace(site, name=name, uses=(use,), parts=nodes[0].meta["recast_parts"])
            targets.update(targets_of([site], constants, context.calibration))
        forms = {name: entry.form for name, entry in context.plan.entries.items() if name in targets}
        apart = fitted_apart(forms, targets, context.calibration)
        together = {name: names for names in apart for name in names}
        if context.jobs is not None:

            def fit(names: list[str]) -> None:
                _fits([targets[name] for name in names], context)

            mapped(fit, apart, jobs=context.jobs, label="fitting", progress=context.progress)
        rows: list[SiteRow] = []
        taken: set[str] = set()
        position = {node: i for i, node in enumerate(result.graph.nodes)}
        calls: dict[Hashable, tuple[int, str, fx.Node]] = {}
        visits = {
            name: nodes[0].meta["recast_rows"] for name, nodes in marked.items() if "recast_rows" in nodes[0].meta
        }
        for name, nodes in track(list(marked.items()), "rewriting", context.progress):
            operator, form, order = _operator(name, targets, together, context, rows, visits)
            module = OperatorModule(operator, name, form, order)
            path = _free_path(name, taken)
            set_by_path(result.module, path, module)
            for node in nodes:
                key = (node.args[0], node.args[2:], identity_of(operator), name if order is not None else "")
                at, first, call = calls.get(key, (len(position), "", node))
                if at < position[node]:  # experts that share a matrix: it is multiplied once
                    node.replace_all_uses_with(call)
                    result.graph.erase_node(node)
                    if len(nodes) == 1:
                        rows[-1] = dataclasses.replace(rows[-1], same_as=first)
                else:
                    calls[key] = position[node], name, put_module(result, node, path)
        remove_dead(result.graph)  # weights that nothing reads any more
        propagate(result)
        result.graph.lint()
        result.module.recompile()
        context.notes[self.name] = rows
        return result


def _free_path(name: str, taken: set[str]) -> str:
    """Where to hold a site's operator: ``a.b_c`` and ``a_b.c`` must not meet."""
    plain = re.sub(r"\W", "_", name)
    path = next(p for i in itertools.count() if (p := f"{plain}_{i}" if i else plain) not in taken)
    taken.add(path)
    return f"recast_operators.{path}"


def put_module(program: Program, node: fx.Node, path: str) -> fx.Node:
    """Put a call of the module at a path in place of a linear, and give it."""
    bias = node.args[2] if len(node.args) > 2 else None
    with program.graph.inserting_before(node):
        call = program.graph.call_module(path, (node.args[0],) if bias is None else (node.args[0], bias))
    call.meta = {k: v for k, v in node.meta.items() if k != "val"}
    node.replace_all_uses_with(call)
    program.graph.erase_node(node)
    return call


def _operator(
    name: str,
    targets: dict[str, Target],
    together: dict[str, list[str]],
    context: Context,
    rows: list[SiteRow],
    visits: dict[str, int],
) -> tuple[Operator, str, Tensor | None]:
    """Fit a site as a whole, or its parts each in its own form.

    `together` has the sites that each one is fitted with, `visits` how many rows an expert is computed on for one sent to it.
    """

    def fit(target: Target) -> Operator:
        return _fit(target, [targets[other] for other in together[target.name]], context, rows, visits)

    entries = context.plan.entries
    whole = targets[name]
    if name in entries:
        return fit(whole), str(entries[name].form), None
    parts: list[Operator] = []
    forms: list[str] = []
    for part in whole.site.parts:
        target = targets[f"{name}.{part.name}"]
        if target.name in entries:
            parts.append(fit(target))
            forms.append(str(entries[target.name].form))
        else:
            parts.append(Dense(target.matrix.read().clone()))
            forms.append("dense")
    if not parts:
        raise PlanError(f"plan: nothing is planned for '{name}'")
    return RowStack(tuple(parts)), "; ".join(forms), _order(whole)


def _order(target: Target) -> Tensor | None:
    """Where each of the model's rows stands among the parts' rows; None if they stand in order."""
    stacked = torch.cat([torch.arange(a, b) for part in target.site.parts for a, b in part.rows])
    order = torch.argsort(stacked)
    return None if bool((order == torch.arange(len(order))).all()) else order


def _fit(
    target: Target, members: list[Target], context: Context, rows: list[SiteRow], visits: dict[str, int]
) -> Operator:
    entry = context.plan.entries[target.name]
    fits = _fits(members, context)
    position = members.index(target)
    fitted = fits[position]
    row = SiteRow.of(entry, target.matrix, fitted, pictures=context.pictures)
    kept = context.notes.get("kept")  # what else reads the weight keeps it: the operator comes on top
    beside = 0 if kept is None else kept.nbytes.get(target.name, 0)
    operators = [f.operator for f in fits]
    nbytes = divided(operators)[position] + beside
    flops = operations(members, operators, visits)[position]
    rows.append(dataclasses.replace(row, bytes_after=nbytes, flops_after=flops))
    return fitted.operator


def _fits(members: list[Target], context: Context) -> list[Fitted]:
    """Fitted operators of sites that are fitted together, most often of one."""
    form = context.plan.entries[members[0].name].form
    matrices, stats = [m.matrix for m in members], [m.stats for m in members]
    return context.cache.fit_together(matrices, form, stats, where=[m.name for m in members])
