"""`rewrite`: carry a plan out, verify every pass, and report what happened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.passes.arguments import check_calibration, check_plan, check_program
from recast.passes.base import Context, Pipeline, Soundness, discover
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.exact import Note
from recast.passes.failure import verify
from recast.passes.forms.scaled import ScaledInputs
from recast.passes.left_dense import left_dense
from recast.passes.modules.apply import is_module, make_smaller
from recast.passes.parallel import check_jobs
from recast.passes.plan import Plan
from recast.passes.report import Report, SiteRow, fidelity
from recast.passes.verify import inputs_of
from recast.patterns.errors import PlanError, nearest
from recast.patterns.find import coverage
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite

__all__ = ["pipeline_for", "rewrite"]


def pipeline_for(plan: Plan) -> Pipeline:
    """The passes that carry a plan out."""
    discover()
    steps = ["apply_modules"] if any(map(is_module, plan.entries.values())) else []
    if not all(map(is_module, plan.entries.values())):
        steps.append("raise_sites,apply_forms")
    if any(isinstance(form := entry.form, ScaledInputs) and form.shared for entry in plan.entries.values()):
        steps.append("fold_input_scale")
    if plan.compute_dtype is not None:
        steps.append(f"cast{{dtype={plan.compute_dtype}}}")
    return Pipeline.parse(",".join(steps))


def rewrite(
    program: Program,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
    cache: OperatorCache | None = None,
    verification: bool = True,
    progress: bool | None = None,
    pictures: bool = True,
    measure: bool = True,
    jobs: int | None = None,
) -> Program:
    """Carry a plan out.

    Parameters
    ----------
    program
        The program that was planned for; it is not changed.
    plan
        As `recast.plan` made it, or as edited and loaded again.
    calibration
        Statistics, where the plan was loaded from text and had some; a plan fresh from `recast.plan` brings its own.
    cache
        Fitted operators; by default on disk.
    verification
        Check structure, metadata, interface, ownership and numbers after every pass.
    progress
        Show a progress bar; by default on a terminal.
    pictures
        Gather what the report's pictures need; False saves a little time.
    measure
        Run the whole program before and after, to measure the error of its outputs.
    jobs
        Fit what is not fitted yet so many sites at a time, each on one core; see `recast.plan`.

    Returns
    -------
    Program
        With ``.report``.

    Raises
    ------
    PlanError
        The plan is of another model, names a site that is not there, or the program is in training mode.
    VerificationError
        A pass broke something.

    Examples
    --------
    >>> import torch, recast
    >>> program = recast.capture(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), (torch.randn(3, 64),))
    >>> rewritten = recast.rewrite(program, recast.plan(program, "int8"))
    >>> rewritten.report.rows[0].form
    'int8'
    """
    check_jobs(jobs)
    check_program(program, "rewrite", PlanError)
    check_plan(plan, "rewrite")
    check_calibration(calibration, "rewrite")
    calibration = calibration or plan.calibration
    sites = _check(program, plan, calibration)
    pipeline = pipeline_for(plan)
    pipeline.check()
    if program.training and pipeline.soundness is not Soundness.EXACT:
        raise PlanError(
            f"rewrite: {program.label} was captured in training mode, where dropout and batch statistics would be frozen in; "
            "call model.eval() before recast.capture"
        )
    context = Context(plan, calibration, cache or OperatorCache.default(), progress, pictures, jobs=jobs)
    current = program
    passes: dict[str, dict[str, Any]] = {}
    for step in pipeline.passes:
        following = step.run(current, context)
        passes[str(step)] = {"soundness": step.soundness.value, "verified": False}
        if verification:
            passes[str(step)] = verify(program, current, following, step, list(passes)[:-1], context)
        if isinstance(note := context.notes.get(str(step)), Note):
            passes[str(step)] |= note.to_dict()
        current = following
    if current is program:
        current = program.copy()
    smaller = context.notes.get("blocks")
    remade = {linear for linears in smaller.parts.values() for linear in linears} if smaller is not None else set()
    current.plan = plan
    rows = [*context.notes.get("apply_modules", []), *context.notes.get("apply_forms", [])]
    current.report = Report(
        model=program.label,
        rows=rows,
        skipped=left_dense(plan.skipped, plan.entries, remade, sites),
        bytes_before=program.nbytes(),
        bytes_after=current.nbytes(),
        coverage=coverage(program).to_dict(),
        whole=_whole(program, current, context) if passes and measure else {},
        passes=passes,
        notes=list(dict.fromkeys([*program.notes, *plan.notes, *_beside(program, current, rows, context)])),
    )
    return current


def _check(program: Program, plan: Plan, calibration: Calibration | None) -> list[LinearSite]:
    """Every linear of the program, if the plan goes with it; PlanError if not."""
    found = program.fingerprint()
    if plan.fingerprint and plan.fingerprint != found:
        raise PlanError(
            f"plan: it was made for model {plan.fingerprint}, this is {found} ({program.label}); plan again"
        )
    blocks = {name: entry for name, entry in plan.entries.items() if is_module(entry)}
    linears, _ = find_linear(program)
    sites = linears
    names = {s.name for s in sites} | {f"{s.name}.{p.name}" for s in sites for p in s.parts}
    if blocks and not plan.entries.keys() <= names | blocks.keys():
        # Parts of a packed matrix may have other names when it is smaller.
        sites, _ = find_linear(make_smaller(program, blocks, calibration).program)
        names |= {s.name for s in sites} | {f"{s.name}.{p.name}" for s in sites for p in s.parts}
    for name in plan.entries.keys() - blocks.keys():
        if name not in names:
            raise PlanError(f"plan: there is no site '{name}' in {program.label}; {nearest(name, names)[:400]}")
    for site in sites:
        both = [f"{site.name}.{p.name}" for p in site.parts if f"{site.name}.{p.name}" in plan.entries]
        if site.name in plan.entries and both:
            raise PlanError(
                f"plan: '{site.name}' is planned as a whole and in parts ({', '.join(both)}); keep one of the two"
            )
    if calibration is not None:
        calibration.check(program)
        if plan.statistics not in (None, calibration.hash):
            raise PlanError(
                f"plan: it was made with calibration {plan.statistics}, {calibration.hash} was given; pass that one, plan "
                "again, or remove the line 'statistics'"
            )
    elif plan.statistics is not None:
        raise PlanError(
            f"plan: it was made with calibration {plan.statistics}, which is not at hand; pass it: "
            "recast.rewrite(program, plan, calibration=recast.Calibration.load(path)), or remove the line 'statistics'"
        )
    return linears


def _beside(before: Program, after: Program, rows: list[SiteRow], context: Context) -> list[str]:
    """What is held that the figures of sites do not tell: dense weights that stay, and anything else."""
    kept = context.notes.get("kept")
    notes = [] if kept is None else list(kept.notes)
    promised = before.nbytes() + sum(row.bytes_after - row.bytes_before for row in rows)
    over = after.nbytes() - promised
    if over <= 0:
        return notes
    modules = {
        str(n.target): after.module.get_submodule(str(n.target)) for n in after.graph.find_nodes(op="call_module")
    }
    causes = [
        f"{order.nbytes:,} for the order of the rows of {module.site}"
        for module in modules.values()
        if isinstance(order := getattr(module, "order", None), Tensor)
    ]
    if context.plan.compute_dtype is not None:
        causes.append(f"weights in {context.plan.compute_dtype}")
    if not causes:
        causes.append(
            "sites count their matrices as they are multiplied, and a weight may hold several or be cast first"
        )
    notes.append(f"bytes: {over:,} more are held than the sites' figures add up to: {'; '.join(causes)}")
    return notes


def _whole(before: Program, after: Program, context: Context) -> dict[str, dict[str, float]]:
    """Fidelity of each floating output of the whole model on the first calibration batch (random inputs without one)."""
    probe = inputs_of(before, context)
    with torch.no_grad():
        reference = context.outputs(before, lambda: before.module(*probe))
        found = context.outputs(after, lambda: after.module(*probe))
    named = dict(zip((str(node.target) for node in before.inputs()), probe, strict=True))
    mask = named.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return {
        f"output {i}": fidelity(a, b, mask)
        for i, (a, b) in enumerate(zip(reference, found, strict=True))
        if isinstance(a, Tensor) and a.is_floating_point()
    }
