"""`plan`: decide for every site of a program what it becomes, with predicted error and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from recast.passes.arguments import check_calibration, check_program
from recast.passes.budget import check_budget
from recast.passes.cache import OperatorCache
from recast.passes.calibration import Calibration
from recast.passes.decide import decide
from recast.passes.decided import Entry, Plan, Skip
from recast.passes.follow import root_of
from recast.passes.forms.form import Form
from recast.passes.forms.operator import Operator, identity_of
from recast.passes.forms.scaled import ScaledInputs
from recast.passes.forms.shared import SharedForm, divided, groups_of
from recast.passes.forms.stats import Stats
from recast.passes.left_dense import outside_blocks
from recast.passes.modules.apply import choose
from recast.passes.parallel import check_jobs, mapped
from recast.passes.recipe import Recipe, name_matches
from recast.passes.remains import Kept, remains_of
from recast.patterns.constants import Constants
from recast.patterns.errors import CoverageError, FormError, PlanError, nearest
from recast.patterns.find import coverage
from recast.patterns.linear.find import Matrix, find_linear, matrix_of
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite

__all__ = [
    "Entry",
    "Plan",
    "Skip",
    "Target",
    "fitted_apart",
    "forms_by_name",
    "kept_beside",
    "measured_entries",
    "operations",
    "plan",
    "targets_of",
]


@dataclasses.dataclass(frozen=True)
class Target:
    """What an entry of a plan stands for: a site, or some rows of one."""

    name: str
    site: LinearSite
    matrix: Matrix
    stats: Stats | None


def targets_of(sites: list[LinearSite], constants: Constants, calibration: Calibration | None) -> dict[str, Target]:
    """Every name a plan may speak of: sites, and parts of packed ones as ``site.part``."""
    found: dict[str, Target] = {}
    for site in sites:
        matrix = matrix_of(site.uses[0], constants)
        known = calibration if calibration is not None and site.name in calibration else None
        found[site.name] = Target(site.name, site, matrix, known.of(site.name) if known else None)
        for part in site.parts:
            name = f"{site.name}.{part.name}"
            seen = known.of(site.name, part.name) if known else None
            found[name] = Target(name, site, matrix.rows(part.rows), seen)
    return found


def plan(
    program: Program,
    recipe: Any,
    calibration: Calibration | None = None,
    *,
    cache: OperatorCache | None = None,
    progress: bool | None = None,
    jobs: int | None = None,
) -> Plan:
    """Decide on a form for every site, with predicted error and cost; nothing is rewritten yet.

    Parameters
    ----------
    program
        As captured.
    recipe
        A form's text, a path to a YAML file, a dict, a `Form` or a `Recipe`.
    calibration
        Statistics for data-aware fits and predictions on data.
    cache
        Where fitted operators are kept; by default on disk.
    progress
        Show a progress bar; by default on a terminal.
    jobs
        Fit so many sites at a time, each on one core; by default one after another on all cores. Interrupted fitting goes on
        where it stopped: fits that were done are in the cache, and long searches keep there what they have reached.

    Returns
    -------
    Plan
        Forms that would take more bytes and more operations than dense are refused and listed under ``skipped``.

    Raises
    ------
    RecipeError, FormError, WeightError, CalibrationError
        The recipe cannot be read, does not fit a weight, or weights or statistics are unusable.
    PlanError
        A budget is to choose among forms that it cannot weigh, or layers are to be grouped by a drift that was not measured.
    CoverageError
        Fewer parameters were matched than ``min_coverage`` asks for.

    Examples
    --------
    >>> import torch, recast
    >>> program = recast.capture(torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), (torch.randn(3, 64),))
    >>> recast.plan(program, "int8").entries["0"].bytes_after
    4352
    """
    check_jobs(jobs)
    check_program(program, "plan", PlanError)
    check_calibration(calibration, "plan")
    asked = Recipe.of(recipe)
    asked.check()
    if calibration is not None:
        calibration.check(program, asked)
    cache = cache or OperatorCache.default()
    covered = coverage(program)
    check_coverage(covered.fraction, asked.min_coverage, covered)
    check_budget(asked)
    # Blocks come first: what is decided for linears is decided for those of smaller blocks.
    smaller, unchanged = choose(program, asked, calibration, progress)
    constants = Constants(smaller.program)
    sites, _ = find_linear(smaller.program, constants)
    targets = targets_of(sites, constants, smaller.calibration)
    wanted, ruled, skipped = forms_by_name(asked, sites)
    entries: dict[str, Entry] = {}
    options: dict[str, list[Entry]] = {}

    def measured(names: list[str]) -> list[list[Entry]]:
        if len(names) > 1:
            return [[entry] for entry in measured_entries(names, wanted[names[0]][0], targets, cache)]
        mere = () if names[0] in ruled else asked.candidates
        return [_measured(names[0], wanted[names[0]], targets, cache, mere)]

    together = fitted_apart({name: forms[0] for name, forms in wanted.items()}, targets, calibration)
    for names, found in zip(
        together, mapped(measured, together, jobs=jobs, label="fitting", progress=progress), strict=True
    ):
        options.update(zip(names, found, strict=True))
    chosen = decide(options, targets, asked, ruled, together)
    for name, entry in chosen.items():
        if isinstance(entry, Skip):
            skipped.append(entry)
        else:
            entries[name] = entry
    kept = kept_beside(entries, targets, sites, constants)
    for name, nbytes in kept.nbytes.items():
        entries[name] = dataclasses.replace(entries[name], bytes_after=entries[name].bytes_after + nbytes)
    remade = {linear: block for block, linears in smaller.parts.items() for linear in linears}
    skipped, inner = outside_blocks(skipped, remade, sites, wanted)
    seen = {name: targets[name].stats for name in entries}
    if calibration is not None:
        for name, fit in smaller.fits.items():
            ends = {end: end for end in fit.stand_ins} or {name: fit.end or next(iter(fit.made))}
            seen |= {known: calibration.of(end) for known, end in ends.items() if end in calibration}
    return Plan(
        fingerprint=program.fingerprint(),
        entries=smaller.entries | entries,
        skipped=[*unchanged, *skipped],
        compute_dtype=asked.compute_dtype,
        recipe=asked.to_dict(),
        statistics=calibration.hash if calibration is not None else None,
        calibration=calibration,
        coverage=covered.fraction,
        notes=[
            *_idle(asked, sites, smaller.names),
            *_unshared(entries, together),
            *kept.notes,
            *inner,
            *_notes(seen),
            *_unseen(entries, seen),
        ],
    )


def _unshared(entries: Mapping[str, Entry], together: Sequence[Sequence[str]]) -> list[str]:
    """Say which groups share nothing that is worth it."""
    told = []
    for names in together:
        kept = [name for name in names if name in entries]
        shared = entries[kept[0]].form.shared_part if kept else None
        if isinstance(shared, SharedForm) and (why := shared.idle(len(names))) is not None:
            told.append(f"{shared}: {why} (at {', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''})")
    return told


def _notes(fitted: Mapping[str, Stats | None]) -> list[str]:
    """Say which sites were fitted with fewer vectors than they have inputs."""
    short = {name: stats for name, stats in fitted.items() if stats is not None and stats.deficient}
    if not short:
        return []
    named = ", ".join(list(short)[:3]) + (f" and {len(short) - 3} more" if len(short) > 3 else "")
    seen = [(stats.tokens, stats.features) for stats in short.values()]
    tokens, features = min(seen, key=lambda pair: pair[0] / pair[1])
    text = (
        f"calibration: {len(short)} of {len(fitted)} sites saw fewer vectors than they have inputs ({named}; at worst {tokens} "
        f"for {features}); their statistics were shrunk towards independent inputs, and errors predicted for them are too "
        f"low; batches that bring every site {max(features for _, features in seen)} vectors or more would do"
    )
    return [text]


def _unseen(entries: Mapping[str, Entry], seen: Mapping[str, Stats | None]) -> list[str]:
    """Say which forms are not what they are with data, since there is none."""
    blind: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if seen.get(name) is None and (told := entry.form.without_data) is not None:
            blind.setdefault(told, []).append(name)
    return [
        f"no statistics: {told}, at {len(names)} of {len(entries)} sites ({', '.join(names[:3])}"
        f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}); recast.calibrate, or `--calibrate`, gathers them"
        for told, names in blind.items()
    ]


def check_coverage(found: float, asked: float, covered: Any) -> None:
    """Raise CoverageError, with the misses, where less was matched than asked."""
    if found < asked:
        misses = "\n".join(f"  {m.name} ({m.kind}, {m.parameters:,} parameters): {m.reason}" for m in covered.misses)
        raise CoverageError(
            f"coverage: {asked:.1%} of the matrix parameters must be matched, {found:.1%} are; not matched:\n{misses}\n"
            "lower min_coverage, or see `recast explain MODEL SITE` for what stands in the way"
        )


def forms_by_name(recipe: Recipe, sites: list[LinearSite]) -> tuple[dict[str, list[Form]], set[str], list[Skip]]:
    """Forms to consider for each site or part, names for which a rule decides, and what stays dense."""
    wanted: dict[str, list[Form]] = {}
    ruled: set[str] = set()
    skipped: list[Skip] = []
    for site in sites:
        for name, whole in _apart(recipe, site):
            form, why = recipe.form_for(name, whole=whole)
            by_rule = why != "default"
            extra = recipe.candidates if recipe.budget is not None and not by_rule else ()
            offered = list(dict.fromkeys(f for f in (form, *extra) if f is not None and not _is_dense(f)))
            named = recipe.names(name) or (whole is not None and recipe.names(whole))
            if not offered and form is None:
                skipped.append(Skip(name, why if by_rule else f"left dense by the recipe ({why})"))
            elif not offered:
                skipped.append(Skip(name, f"dense by the recipe ({why})"))
            elif site.tied and not (recipe.tied or named):
                others = ", ".join(site.tied)
                reason = (
                    f"tied: {others} reads the same weight and keeps it dense; name the site in a rule to rewrite it"
                )
                skipped.append(Skip(name, reason))
            else:
                wanted[name] = offered
                if by_rule:
                    ruled.add(name)
    return wanted, ruled, skipped


def _apart(recipe: Recipe, site: LinearSite) -> list[tuple[str, str | None]]:
    """The site as a whole, or its parts where the recipe treats some of them in their own way."""

    def treated(name: str, whole: str | None = None) -> tuple[Form | None, bool]:
        form, why = recipe.form_for(name, whole=whole)
        return form, recipe.budget is not None and why == "default"  # a budget chooses only where no rule decides

    parts = [(f"{site.name}.{p.name}", site.name) for p in site.parts]
    whole = treated(site.name)
    return list(parts) if any(treated(name, of) != whole for name, of in parts) else [(site.name, None)]


def _idle(recipe: Recipe, sites: list[LinearSite], blocks: tuple[str, ...]) -> list[str]:
    """Lines of the recipe that no site answers to, most likely misspelled."""
    names = [*blocks, *(s.name for s in sites), *(f"{s.name}.{p.name}" for s in sites for p in s.parts)]
    lines = [("rule", r.match) for r in recipe.rules] + [("exclude", pattern) for pattern in recipe.exclude]
    return [
        f"recipe: {kind} '{pattern}' matches no site; {nearest(pattern, names)[:200]}"
        for kind, pattern in lines
        if not any(name_matches(pattern, name) for name in names)
    ]


def _is_dense(form: Form) -> bool:
    return str(form) == "dense"


def kept_beside(
    names: Iterable[str], targets: Mapping[str, Target], sites: list[LinearSite], constants: Constants
) -> Kept:
    """Dense weights that stay beside what is rewritten of them, when these names are."""
    planned = {name: targets[name].matrix.nbytes for name in names}
    remains = remains_of(sites, {targets[name].site.name for name in planned}, constants)
    return Kept.of(remains, sites, planned)


def fitted_apart(
    forms: Mapping[str, Form], targets: Mapping[str, Target], calibration: Calibration | None
) -> list[list[str]]:
    """Names in groups that are fitted together: one each, but where a form shares something between several."""
    shapes = {name: targets[name].matrix.shape for name in forms}
    drift = calibration.drift if calibration is not None else None
    groups = groups_of(forms, shapes, drift) + _same_input(forms, targets)
    first = {group[0]: group for group in groups}
    rest = {name for group in groups for name in group[1:]}
    return [first.get(name, [name]) for name in forms if name not in rest]


def _same_input(forms: Mapping[str, Form], targets: Mapping[str, Target]) -> list[list[str]]:
    """Names of sites whose forms scale their inputs alike, in groups that read the same value."""
    alike: dict[tuple[Form, fx.Node], list[str]] = {}
    for name, form in forms.items():
        if isinstance(form, ScaledInputs) and form.shared:
            alike.setdefault((form, root_of(targets[name].site.uses[0].x)), []).append(name)
    return list(alike.values())


def _measured(
    name: str, forms: list[Form], targets: dict[str, Target], cache: OperatorCache, mere: Collection[Form]
) -> list[Entry]:
    """Fit each form; of mere candidates, those that do not fit this weight are left out."""
    found = []
    for form in forms:
        try:
            found += measured_entries([name], form, targets, cache)
        except FormError:
            if form not in mere:
                raise
    return found


def measured_entries(names: list[str], form: Form, targets: dict[str, Target], cache: OperatorCache) -> list[Entry]:
    """Fit a group of sites, most often of one; bytes that several hold in common are divided between them."""
    members = [targets[name] for name in names]
    matrices, stats = [member.matrix for member in members], [member.stats for member in members]
    fits = cache.fit_together(matrices, form, stats, where=names)
    found = []
    operators = [fitted.operator for fitted in fits]
    for target, fitted, nbytes, flops in zip(
        members, fits, divided(operators), operations(members, operators), strict=True
    ):
        matrix = target.matrix
        found.append(
            Entry(
                name=target.name,
                form=form,
                bytes_before=matrix.nbytes,
                bytes_after=nbytes,
                flops_before=2 * matrix.shape[0] * matrix.shape[1],
                flops_after=flops,
                predicted_error=fitted.predicted_error,
                predicted_weight_error=fitted.weight_error,
            )
        )
    return found


def operations(
    members: Sequence[Target], operators: Sequence[Operator], rows: Mapping[str, int] | None = None
) -> list[int]:
    """Operations a token of each site of a group that is fitted together.

    A rewritten expert is computed on every row, not only on those that are sent to it: of E experts, one row in E. Experts that
    read the same rows and hold the same operator are computed once for all of them, and each counts for its part.

    Parameters
    ----------
    members, operators
        Sites, and what was fitted to each.
    rows
        How many rows it is computed on for one that is sent to it, by name of the site; by default as the program is written.
    """
    held = [(member.site.uses[0].x, identity_of(operator)) for member, operator in zip(members, operators, strict=True)]
    found = []
    for member, operator, key in zip(members, operators, held, strict=True):
        if rows is None:
            each = max((use.routing.count for use in member.site.uses if use.routing is not None), default=1)
        else:
            each = rows.get(member.site.name, 1)
        found.append(-(-operator.cost(1).flops * each // (held.count(key) if each > 1 else 1)))
    return found
