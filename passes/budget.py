"""Choosing forms under a budget: what rules name is spent first, the rest goes where it saves the most error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from recast.passes.allocate import allocate
from recast.passes.decided import Entry, Skip
from recast.passes.recipe import Recipe
from recast.patterns.errors import PlanError

__all__ = ["check_budget", "pays", "under_budget", "would_not_pay"]


def pays(entry: Entry) -> bool:
    """Whether a form takes fewer bytes or fewer operations than dense."""
    return entry.bytes_after < entry.bytes_before or entry.flops_after < entry.flops_before


def would_not_pay(entry: Entry, which: str = "") -> str:
    """Say why a form that does not pay is left out; `which` adds for whom."""
    return (
        f"{entry.form} would not pay{which}: {entry.bytes_after:,} bytes and {entry.flops_after:,} operations a token, dense "
        f"takes {entry.bytes_before:,} and {entry.flops_before:,}; allow_larger overrides"
    )


def check_budget(recipe: Recipe) -> None:
    """Refuse what a choice site by site cannot weigh: bytes of a shared form depend on what other sites take.

    Raises
    ------
    PlanError
        A form is shared between sites, or is one of a whole block.
    """
    for form, told in recipe.of_several_matrices() if recipe.budget is not None else ():
        raise PlanError(
            f"plan: '{form}' {told}, and a budget chooses for each matrix by itself; "
            "plan without a budget, or choose among forms of one matrix"
        )


def under_budget(
    options: Mapping[str, Sequence[Entry]],
    dense: Mapping[str, int],
    tokens: Mapping[str, int],
    beside: Mapping[str, int],
    ruled: Collection[str],
    recipe: Recipe,
) -> dict[str, Entry | Skip]:
    """One form of each site, or dense, so that the sum of squared errors is least within the recipe's budget.

    Parameters
    ----------
    options
        What each site may become, besides dense.
    dense, tokens
        Bytes of each dense matrix, and how many vectors it was seen to multiply.
    beside
        Bytes that stay whatever a site becomes, since something else reads its weight.
    ruled
        Sites whose only option is what a rule says: their bytes count, the budget does not choose.
    recipe
        With a budget.

    Raises
    ------
    PlanError
        What rules name, or the smallest candidates, take more than the budget.
    """
    assert recipe.budget is not None
    # What does not pay by itself is no choice here either, and None is dense.
    paying = {n: [e for e in entries if recipe.allow_larger or pays(e)] for n, entries in options.items()}
    rows: dict[str, list[Entry | None]] = {}
    for name, entries in paying.items():
        rows[name] = [entries[0] if entries else None] if name in ruled else [None, *entries]
    costs = {n: [dense[n] if e is None else e.bytes_after + beside.get(n, 0) for e in row] for n, row in rows.items()}
    # An expert that few tokens visit adds little to what is lost, but for one that none did something must be taken.
    most = max(tokens.values(), default=0)
    errors = [
        [0.0 if e is None else (tokens[n] + 1) / (most + 1) * e.predicted_error**2 for e in row]
        for n, row in rows.items()
    ]
    picks = allocate(errors, list(costs.values()), recipe.budget * sum(dense[n] for n in rows))
    if picks is None:
        raise _too_small(rows, costs, dense, ruled, recipe.budget)
    chosen: dict[str, Entry | Skip] = {}
    for (name, row), pick in zip(rows.items(), picks, strict=True):
        entry = row[pick]
        chosen[name] = entry if entry is not None else Skip(name, _why_dense(options[name], paying[name]))
    return chosen


def _why_dense(options: Sequence[Entry], paying: Sequence[Entry]) -> str:
    if paying:
        return "dense fits the budget best here"
    return "; ".join(would_not_pay(entry) for entry in options) or "no candidate goes with a weight of this shape"


def _too_small(
    rows: Mapping[str, Sequence[Entry | None]],
    costs: Mapping[str, Sequence[int]],
    dense: Mapping[str, int],
    ruled: Collection[str],
    budget: float,
) -> PlanError:
    """The error that says what takes more than there is."""
    total = sum(dense[n] for n in rows)
    least = sum(map(min, costs.values()))
    share = math.ceil(1000 * least / total) / 10
    raised = f", or raise the budget to {share:.1f}%" if share <= 100 else ""
    asked = f"plan: a budget of {budget * 100:.4g}% of {total:,} bytes cannot be met"
    fixed = {n: costs[n][0] for n in rows if n in ruled}
    if sum(fixed.values()) > budget * total:
        largest = sorted(fixed, key=lambda n: fixed[n], reverse=True)[:3]
        told = ", ".join(f"'{n}' {'dense' if rows[n][0] is None else rows[n][0].form} {fixed[n]:,}" for n in largest)  # type: ignore[union-attr]
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        return PlanError(
            f"{asked}: what rules name takes {sum(fixed.values()):,} bytes by itself ({told}{more}), it allows "
            f"{int(budget * total):,}; give smaller forms in the rules{raised}"
        )
    return PlanError(
        f"{asked}: the smallest candidates take {least:,} bytes ({least / total:.1%})"
        f"{f', {sum(fixed.values()):,} of them by rules' if fixed else ''}; add smaller candidates, such as int4 or "
        f"low_rank(ratio=0.2){raised}"
    )
