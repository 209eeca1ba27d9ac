"""Whether a rewritten matrix is faster than the dense one, on this machine and target: measured once, kept, refused where it is not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recast.lowering.base import lowering_named
from recast.lowering.inline import structure_of
from recast.lowering.timing import medians, read_times, times_file, write_times
from recast.passes.decided import Plan, Skip
from recast.passes.forms.operator import Operator
from recast.passes.module import OperatorModule
from recast.passes.progress import track
from recast.passes.rules.apply_forms import put_module
from recast.patterns.capture.export import capture
from recast.patterns.errors import PlanError
from recast.patterns.program import Program, set_by_path

__all__ = ["SLACK", "Times", "refuse_slower", "time_operator"]

# A form counts as slower from here on: less is within what two runs of the same code differ by.
SLACK = 1.05


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one product, by the number of tokens.

    Attributes
    ----------
    dense, form
        Medians over rounds in which both took turns.
    """

    dense: Mapping[int, float]
    form: Mapping[int, float]

    @property
    def slower(self) -> bool:
        """Whether the form is slower than dense for every number of tokens."""
        return all(self.form[tokens] > SLACK * self.dense[tokens] for tokens in self.form)

    def __str__(self) -> str:
        told = (f"{self.form[t] * 1e3:.3g} against {self.dense[t] * 1e3:.3g} ms at {t} tokens" for t in self.form)
        return ", ".join(told)


def time_operator(operator: Operator, target: str, tokens: Sequence[int], *, remember: bool = True) -> Times:
    """Time an operator on a target beside a dense matrix of its shape and dtype.

    Parameters
    ----------
    operator
        What was fitted; times depend on its structure and shapes, not on its values.
    target
        As for `recast.lower`.
    tokens
        Numbers of vectors (tokens, n).
    remember
        Look for the times on disk and keep them there, by device, versions and the source of the kernels
        (``RECAST_CACHE=off`` does neither).

    Examples
    --------
    >>> from recast.passes.forms import Form
    >>> operator = Form.parse("low_rank(rank=8)").fit(torch.randn(64, 64))
    >>> sorted(time_operator(operator, "eager", [1, 16], remember=False).form)
    [1, 16]
    """
    if not tokens or any(count < 1 for count in tokens):
        raise PlanError(f"tokens: {list(tokens)} names no numbers of vectors; 1 and 128, say, would do")
    file = _file(operator, target, tokens) if remember else None
    kept = None if file is None else read_times(file)
    if kept is not None:
        return Times(*({int(count): seconds for count, seconds in kept[name].items()} for name in ("dense", "form")))
    m, n = operator.shape
    device = next(iter(operator.tensors().values())).device
    linear = nn.Linear(n, m, bias=False, dtype=operator.dtype, device=device).eval()
    dense = capture(linear, (torch.randn(4, n, dtype=operator.dtype, device=device),))
    runs = [lowering_named(target)().prepare(program) for program in (dense, _instead(dense, operator))]
    found = Times({}, {})
    for count in tokens:
        x = torch.randn(count, n, dtype=operator.dtype, device=device)
        turns = [functools.partial(run, [x]) for run in runs]
        for seconds, median in zip((found.dense, found.form), medians(turns, device), strict=True):
            seconds[count] = median  # type: ignore[index]  # filled here, read elsewhere
    if file is not None:
        write_times(file, dataclasses.asdict(found))
    return found


def refuse_slower(
    rewritten: Program, plan: Plan, target: str, tokens: Sequence[int], *, progress: bool | None = None
) -> Plan:
    """Take what is slower than dense at every number of tokens out of a plan; it is listed as skipped, with the figures.

    Parameters
    ----------
    rewritten
        The program with the plan carried out, whose operators are timed: one of each structure and shape.
    plan, target
        The plan; where the program is to run.
    tokens
        Numbers of vectors that matter to the user.

    Returns
    -------
    Plan
        The same one if nothing is slower.
    """
    sites: dict[str, OperatorModule] = {}
    for node in rewritten.graph.nodes:
        if node.op == "call_module":
            module = rewritten.module.get_submodule(str(node.target))
            assert isinstance(module, OperatorModule)
            sites[module.site] = module
    known: dict[Any, Times] = {}
    refused: dict[str, Skip] = {}
    for site, module in track(list(sites.items()), "timing", progress):
        key = structure_of(module.operator), *((name, t.shape) for name, t in module.operator.tensors().items())
        if key not in known:
            known[key] = time_operator(module.operator, target, tokens)
        if known[key].slower:
            parts = (name for name in plan.entries if name.startswith(f"{site}.") and name not in sites)
            names = [site] if site in plan.entries else list(parts)
            names += [row.name for row in rewritten.report.rows if row.same_as == site and row.name in plan.entries]
            reason = f"slower than dense on '{target}': {known[key]}; allow_slower overrides"
            refused.update((name, Skip(name, f"{plan.entries[name].form} is {reason}")) for name in names)
    if not refused:
        return plan
    left = {name: entry for name, entry in plan.entries.items() if name not in refused}
    return dataclasses.replace(plan, entries=left, skipped=[*plan.skipped, *refused.values()])


def _instead(dense: Program, operator: Operator) -> Program:
    result = dense.copy()
    set_by_path(result.module, "recast_operators.timed", OperatorModule(operator, "timed", "timed"))
    (node,) = result.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    put_module(result, node, "recast_operators.timed")
    result.module.recompile()
    return result


def _file(operator: Operator, target: str, tokens: Sequence[int]) -> Path | None:
    """Where times of such an operator are kept on this machine."""
    tensors = [(name, tuple(t.shape), str(t.dtype), str(t.device)) for name, t in sorted(operator.tensors().items())]
    device = next(iter(operator.tensors().values())).device
    return times_file(device, target, sorted(tokens), repr(structure_of(operator)), tensors)
