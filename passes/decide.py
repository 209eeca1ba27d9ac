"""`decide`: which of the forms that were fitted to a site it gets, or why it stays dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from recast.passes.budget import pays, under_budget, would_not_pay
from recast.passes.decided import Entry, Skip
from recast.passes.recipe import Recipe

if TYPE_CHECKING:
    from recast.passes.plan import Target

__all__ = ["decide"]


def decide(
    options: dict[str, list[Entry]],
    targets: dict[str, Target],
    recipe: Recipe,
    ruled: Collection[str] = (),
    together: Sequence[Sequence[str]] = (),
) -> dict[str, Entry | Skip]:
    """One form of each site, or why it stays dense: by the budget but for what rules name, or the first option where that pays.

    Sites that hold something in common stand or fall together; `together` has the groups that were fitted at once.
    """
    if recipe.budget is not None:
        dense = {name: targets[name].matrix.nbytes for name in options}
        tokens = {name: stats.tokens if (stats := targets[name].stats) is not None else 0 for name in options}
        # What else reads a tied weight keeps it: whatever the site takes comes on top.
        beside = {name: dense[name] for name in options if targets[name].site.tied}
        return under_budget(options, dense, tokens, beside, ruled, recipe)
    groups = [group for group in together if options[group[0]][0].form.shared_part is not None]
    group_of = {name: group for group in groups for name in group}
    chosen: dict[str, Entry | Skip] = {}
    for name, (entry, *_) in options.items():
        group = [options[other][0] for other in group_of.get(name, [name])]
        fields = ("bytes_before", "bytes_after", "flops_before", "flops_after")
        whole = dataclasses.replace(entry, **{key: sum(getattr(other, key) for other in group) for key in fields})
        which = f" for the {len(group)} matrices that share it" if len(group) > 1 else ""
        good = recipe.allow_larger or pays(whole)
        chosen[name] = entry if good else Skip(name, would_not_pay(whole, which))
    return chosen
