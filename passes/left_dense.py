"""What a carried-out plan leaves dense, and why: every site that was not rewritten is told of, and none that was."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from recast.passes.decided import Skip
from recast.patterns.sites import LinearSite

__all__ = ["UNNAMED", "left_dense", "outside_blocks"]

UNNAMED = "the plan does not name it"


def left_dense(
    skipped: Sequence[Skip], planned: Collection[str], remade: Collection[str], sites: Sequence[LinearSite]
) -> list[Skip]:
    """Sites, parts and blocks that stay as they are.

    Parameters
    ----------
    skipped
        What the plan says of them; it may have been edited since.
    planned
        Names that the plan gives a form.
    remade
        Linears made anew as part of a block that the plan gives a form.
    sites
        Every linear of the program.

    Returns
    -------
    list of Skip
        Without what was rewritten after all, as a whole or within a block, and with sites and parts that the plan does not name.
    """
    done = {*planned, *remade}
    parts = {site.name: [f"{site.name}.{p.name}" for p in site.parts] for site in sites}
    whole = _wholes(sites)
    reasons = {skip.name: skip.reason for skip in skipped}
    found = [
        s
        for s in skipped
        if s.name not in done and whole.get(s.name) not in done and done.isdisjoint(parts.get(s.name, ()))
    ]
    told = {skip.name for skip in found}
    for name, own in parts.items():
        if name in done or name in told:
            continue
        rest = [part for part in own if part not in done and part not in told]
        if len(rest) < len(own):  # some of its parts are told of, or rewritten: so are the others
            found += [Skip(part, reasons.get(name, UNNAMED)) for part in rest]
        else:
            found.append(Skip(name, UNNAMED))
    return found


def outside_blocks(
    skipped: Sequence[Skip], remade: Mapping[str, str], sites: Sequence[LinearSite], wanted: Collection[str]
) -> tuple[list[Skip], list[str]]:
    """Leave out what was made smaller as part of a block; where a form was asked for besides, a note says why it has none.

    Parameters
    ----------
    skipped
        Sites that take no form of their own.
    remade
        Linears made anew, with the name of the block.
    sites
        Every linear.
    wanted
        Those for which the recipe has forms.
    """
    whole = _wholes(sites)
    left: list[Skip] = []
    notes: list[str] = []
    for skip in skipped:
        block = remade.get(skip.name, remade.get(whole.get(skip.name, "")))
        if block is None:
            left.append(skip)
        elif skip.name in wanted:
            notes.append(f"{skip.name}: made smaller within '{block}' and nothing more: {skip.reason}")
    return left, notes


def _wholes(sites: Sequence[LinearSite]) -> dict[str, str]:
    """The packed site that each part belongs to, by name."""
    return {f"{site.name}.{part.name}": site.name for site in sites for part in site.parts}
