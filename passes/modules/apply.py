"""Making blocks smaller: which ones a recipe asks for, their fits, and the program with smaller matrices in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from recast.passes.calibration import Calibration
from recast.passes.decided import Entry, Skip
from recast.passes.exact import Edit
from recast.passes.modules.block import Block
from recast.passes.modules.blocks import blocks_of
from recast.passes.modules.flow import Picks, Refused, narrow
from recast.passes.modules.form import Fit, ModuleForm
from recast.passes.modules.marks import BLOCK, END
from recast.passes.modules.meeting import meet
from recast.passes.modules.mixture import Mixture
from recast.passes.progress import track
from recast.passes.recipe import Recipe
from recast.patterns.derivation import Derivation
from recast.patterns.errors import PlanError, nearest
from recast.patterns.memo import remembered
from recast.patterns.program import Program

__all__ = ["Smaller", "choose", "is_module", "make_smaller", "names_of"]


@dataclasses.dataclass(frozen=True)
class Smaller:
    """A program with smaller blocks.

    Parameters
    ----------
    program
        The result.
    calibration
        Statistics of what flows in it.
    fits
        By the name of the block.
    entries
        What the fits come to, by the name of the block.
    parts
        Names of the linears that were made anew, by the name of the block.
    names
        Of all blocks there are, where they were looked for.
    taken
        For queries and keys, by the name of the value: which of its features are left.
    """

    program: Program
    calibration: Calibration | None
    fits: dict[str, Fit] = dataclasses.field(default_factory=dict)
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    taken: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def is_module(entry: Entry) -> bool:
    """Whether an entry of a plan is about a whole block."""
    return isinstance(entry.form, ModuleForm)


def names_of(program: Program) -> list[str]:
    """Names of all blocks of a program."""
    return list(blocks_of(Edit(program, "apply_modules"), None))


def choose(
    program: Program, recipe: Recipe, calibration: Calibration | None, progress: bool | None = None
) -> tuple[Smaller, list[Skip]]:
    """Make smaller what a recipe asks for and allows.

    Returns
    -------
    The program as it is after that, and blocks that were asked for and stay as they are, with the reason.

    Raises
    ------
    FormError
        Statistics are missing.
    """
    forms = [recipe.default, *(rule.form for rule in recipe.rules)]
    if not any(isinstance(form, ModuleForm) for form in forms):
        return Smaller(program, calibration), []
    edit = Edit(program, "apply_modules")
    blocks = blocks_of(edit, calibration)
    wanted: dict[str, ModuleForm] = {}
    skipped: list[Skip] = []
    for name, block in blocks.items():
        form, _ = recipe.form_for(name, block.kind, whole=block.sites[0].name)
        if not isinstance(form, ModuleForm):
            continue
        members = {piece.site.name: piece for piece in block.pieces.values()}
        excluded = next((n for n in [name, *members] if recipe.excludes(n)), None)
        if excluded is not None:
            skipped.append(Skip(name, f"'{excluded}' is excluded by '{recipe.excludes(excluded)}'"))
        else:
            wanted[name] = form
    entries: dict[str, Entry] = {}
    taken: dict[str, str] = {}
    for name, form in track(list(wanted.items()), "fitting blocks", progress):
        try:
            fit = _fit(program, blocks[name], form)
            entry = _entry(blocks[name], form, fit)
            worse = entry.bytes_after >= entry.bytes_before and entry.flops_after >= entry.flops_before
            if worse and not recipe.allow_larger:
                raise Refused(f"all of its inner width, {fit.inner[0]}, would be kept; allow_larger overrides")
            if shared := next((f"'{n}' with '{taken[n]}'" for n in fit.made if n in taken), None):
                raise Refused(f"it shares {shared}, which is made smaller already")
            _check_shapes(blocks[name], fit)
        except Refused as reason:
            skipped.append(Skip(name, f"{form}: {reason}"))
            continue
        entries[name] = entry
        taken |= dict.fromkeys(fit.made, name)
    made = make_smaller(program, entries, calibration) if entries else Smaller(program, calibration)
    return dataclasses.replace(made, names=tuple(blocks)), skipped


def make_smaller(program: Program, entries: Mapping[str, Entry], calibration: Calibration | None) -> Smaller:
    """Make blocks smaller as entries of a plan say.

    Raises
    ------
    PlanError
        There is no such block, or it cannot be made smaller.
    FormError
        Statistics are missing.
    """
    edit = Edit(program, "apply_modules")
    blocks = blocks_of(edit, calibration)
    fits: dict[str, Fit] = {}
    done: dict[str, str] = {}
    for name, entry in entries.items():
        if name not in blocks:
            raise PlanError(f"plan: there is no block '{name}' in {program.label}; {nearest(name, blocks)[:400]}")
        form = entry.form
        assert isinstance(form, ModuleForm)
        try:
            fits[name] = _fit(program, blocks[name], form)
            if taken := next((f"'{n}' by '{done[n]}'" for n in fits[name].made if n in done), None):
                raise Refused(f"{taken} was made smaller already")
        except Refused as reason:
            raise PlanError(f"plan: '{name}' cannot become {form}: {reason}") from None
        done |= dict.fromkeys(fits[name].made, name)
    left: dict[str, Tensor] = {}
    for name, fit in fits.items():  # after all fits, which look at the program as it was
        try:
            left |= _replace(edit, blocks[name], entries[name].form, fit)
        except Refused as reason:
            raise PlanError(f"plan: '{name}' cannot become {entries[name].form}: {reason}") from None
    smaller = edit.finish()
    return Smaller(
        smaller,
        None if calibration is None else _adapted(calibration, smaller, fits),
        fits,
        {name: _entry(blocks[name], entries[name].form, fit) for name, fit in fits.items()},
        {name: tuple(fit.made) for name, fit in fits.items()},
        taken=left,
    )


def _fit(program: Program, block: Block, form: object) -> Fit:
    """What a form makes of a block, found once for a program, a form and statistics."""
    assert isinstance(form, ModuleForm)
    if form.site_kind != block.kind:
        raise Refused(f"it is {form.site_kind} that this form is for, and '{block.name}' is {block.kind}")
    statistics = block.calibration
    question = ("fit of a block", block.name, str(form), id(statistics))
    # The statistics are kept with the answer, so that no others can take their place in memory.
    _, fit = remembered(program, question, lambda: (statistics, form.solve_block(block)))
    return fit


def _entry(block: Block, form: object, fit: Fit) -> Entry:
    """Costs and errors of a block: of its linears that change."""
    assert isinstance(form, ModuleForm)
    before = [block.linears[name] for name in fit.made]
    return Entry(
        name=block.name,
        form=form,
        bytes_before=sum(site.parameters * site.dtype.itemsize for site in before),
        bytes_after=sum(fit.made[site.name].matrix.numel() * site.dtype.itemsize for site in before),
        flops_before=sum(2 * site.parameters for site in before),
        flops_after=sum(2 * made.matrix.numel() for made in fit.made.values()),
        predicted_error=fit.predicted_error,
        predicted_weight_error=fit.weight_error,
    )


def _labels(fit: Fit) -> dict[str, Tensor]:
    return {name: made.labels for name, made in fit.made.items() if made.labels is not None}


def _check_shapes(block: Block, fit: Fit) -> None:
    """Refuse a block whose sizes on the way cannot be put right, without changing anything."""
    if isinstance(block, Mixture):
        block.check_fit(fit)
        return
    picks: Picks = {}
    sources, way = block.way(_labels(fit), fit.end, picks if fit.end is None else None)
    narrow(way, sources, fit.kept, change=False)


def _replace(edit: Edit, block: Block, form: object, fit: Fit) -> dict[str, Tensor]:
    """Put smaller matrices in place of a block's, and sizes on the way right; tell what is left of queries and keys."""
    if isinstance(block, Mixture):
        block.replace(form, fit)
        return {}
    picks: Picks = {}
    sources, way = block.way(_labels(fit), fit.end, picks if fit.end is None else None)
    left = meet(edit, block, way, picks, fit.kept) if fit.end is None else {}
    narrow(way, sources, fit.kept)
    for node in way:
        node.meta[BLOCK] = block.name
        if node.name in left:
            node.meta[END] = node.name
    for name, made in fit.made.items():
        site = block.linears[name]
        for use in site.uses:
            matrix, bias = edit.matrix(use), edit.bias(use)
            how = f"{form} of {block.name}"
            w = _fitted(edit, how, made.matrix, matrix)
            b = bias if bias is None or made.bias is None else _fitted(edit, how, made.bias, bias)
            with edit.graph.inserting_before(use.product):
                node = edit.linear(site, use, use.x, w, b)
            node.meta[BLOCK] = block.name
            if name == fit.end:
                node.meta[END] = use.node.name
            edit.replace(use.node, node)
    edit.did(f"{block.name}: {form}, {fit.inner[0]} -> {fit.inner[1]} features")
    return left


def _fitted(edit: Edit, how: str, value: Tensor, old: Derivation) -> Derivation:
    """A weight that follows from data too: its value is told, its formula only says of what it was made."""
    made = Derivation.fitted(how, tuple(value.shape), old)
    edit.values[made] = value
    return made


def _adapted(calibration: Calibration, smaller: Program, fits: Mapping[str, Fit]) -> Calibration:
    """Statistics of what flows in a program with smaller blocks."""
    groups, members = dict(calibration.groups), dict(calibration.members)
    importance = dict(calibration.importance)
    for fit in fits.values():
        for name, made in fit.made.items():
            if made.stats is not None:
                groups[f"{name} (smaller)"], members[name] = made.stats, f"{name} (smaller)"
            for known in [n for n in importance if n == name or n.rpartition(".")[0] == name]:
                del importance[known]  # gradients were those of the larger matrix
    return dataclasses.replace(
        calibration, fingerprint=smaller.fingerprint(), groups=groups, members=members, importance=importance
    )
