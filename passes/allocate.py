"""Choose one option a site under a budget: the multiple-choice knapsack, solved exactly by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["allocate"]


def allocate(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """Pick one option for each site so that the sum of errors is least and the sum of costs stays within the budget.

    Parameters
    ----------
    errors, costs
        For each site, one number an option.
    budget
        Bound on the sum of the costs, in their unit.

    Returns
    -------
    list of int or None
        Option of each site; None if even the cheapest options exceed the budget.

    Notes
    -----
    LQ-LoRA solves the same program with Gurobi; `scipy.optimize.milp` (HiGHS) serves as well.

    Examples
    --------
    >>> allocate([[0, 1], [0, 4]], [[10, 5], [10, 5]], 15)
    [1, 0]
    """
    if not errors:
        return []
    sizes = [len(row) for row in errors]
    if sum(min(row) for row in costs) > budget:
        return None
    count = sum(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: most of a second at the start of every command
    from scipy.sparse import coo_matrix

    once = coo_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(sizes), count))
    flat_costs = np.concatenate([np.asarray(row, dtype=float) for row in costs])
    flat_errors = np.concatenate([np.asarray(row, dtype=float) for row in errors])
    scale = max(1.0, float(flat_costs.max()))
    solved = milp(
        flat_errors / max(1e-300, float(np.abs(flat_errors).max())),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(flat_costs[None] / scale, -np.inf, budget / scale)],
        integrality=np.ones(count, dtype=np.int64),
        bounds=Bounds(0, 1),
    )
    if solved.x is None:
        return None
    picked = np.flatnonzero(solved.x > 0.5)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [int(p - starts[owner[p]]) for p in picked]
