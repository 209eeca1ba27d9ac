"""Which values of a weight are kept: scores, masks, and the fit of SparseGPT that also moves what is kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recast.passes.forms.linear_algebra import inverse_factor
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, nearest

__all__ = [
    "METHODS",
    "check_method",
    "input_energy",
    "normalised",
    "obs_prune",
    "prunes_without_data",
    "scores",
    "top_of_all",
    "top_of_groups",
    "wide",
]

METHODS = ("magnitude", "wanda", "nowag", "sparsegpt")

# Norms below this fraction of the largest count as that much, so that nothing is divided by zero (NoWag's eps).
_NORM_EPS = 1e-5
# Inputs that the data never shows weigh this much of an average one: they are pruned first, the small ones among them.
_DEAD = 1e-8
# Columns whose errors are passed on to the rest of the row together.
_BLOCK = 128
# Rows that are looked at together, where rows do not meet.
_ROWS = 256


def check_method(form: str, method: str | None) -> None:
    """Raise FormError unless a method is one there is."""
    if method is not None and method not in METHODS:
        raise FormError(f"{form}: unknown method {method!r}; {nearest(method, METHODS)}")


def prunes_without_data(form: object, method: str | None) -> str | None:
    """As `Form.without_data`, of a form with a parameter `method`."""
    told = {
        "sparsegpt": "prunes by magnitude",
        "wanda": "prunes by magnitude",
        "nowag": "takes inputs for equally large",
    }
    return f"{form} {told[method]}" if method in told else None


def wide(weight: Tensor) -> Tensor:
    """Return a weight in at least float32, as scores are computed."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def input_energy(weight: Tensor, stats: Stats | None) -> Tensor:
    """Return the sum of squares of each input over the data, (n,) with mean 1; ones without data."""
    n = weight.shape[1]
    energy = torch.ones(n, dtype=torch.float64, device=weight.device)
    if stats is not None and stats.gram is not None:
        seen = stats.gram.diagonal().to(weight.device, torch.float64).clamp_min(0)
        if bool(seen.any()):
            energy = (seen / seen.mean()).clamp_min(_DEAD)
    return energy


def normalised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a weight by the norms of its columns, then by those of its rows: (W̄, rows (m,), columns (n,))."""
    columns = _floored(weight.norm(dim=0))
    divided = weight / columns
    rows = _floored(divided.norm(dim=1))
    return divided / rows.unsqueeze(1), rows, columns


def _floored(norms: Tensor) -> Tensor:
    top = norms.max()
    return torch.where(top > 0, norms.clamp_min(_NORM_EPS * top), 1)


def scores(weight: Tensor, stats: Stats | None, method: str) -> Tensor:
    """Return how much each value of a weight (m, n) matters, not negative.

    ``magnitude``: ``w²``; ``wanda``: ``w² ‖X_j‖²`` (Sun et al., 2023, whose score is the root of this); ``nowag``:
    ``w̄² ‖X_j‖²`` of the normalised weight.
    """
    if method == "magnitude":
        return wide(weight).square()
    base = normalised(wide(weight))[0] if method == "nowag" else wide(weight)
    return base.square().mul_(input_energy(weight, stats).to(base.dtype))


def top_of_groups(score: Tensor, keep: int, of: int) -> Tensor:
    """Mark the `keep` largest of every `of` values in a row of (m, n), and as many of what is left over at its end."""
    m, n = score.shape
    if m > _ROWS:  # places take eight bytes each
        return torch.cat([top_of_groups(rows, keep, of) for rows in torch.split(score, _ROWS)])
    groups = -(-n // of)
    filled = torch.nn.functional.pad(score, (0, groups * of - n), value=-1).reshape(m, groups, of)
    mask = torch.zeros_like(filled, dtype=torch.bool).scatter_(2, filled.topk(keep, dim=2).indices, True)
    return mask.reshape(m, groups * of)[:, :n]


def top_of_all(score: Tensor, count: int) -> Tensor:
    """Mark the `count` largest values of a matrix; of equal ones the first."""
    flat = score.reshape(-1)
    if count == 0 or count == len(flat):
        return torch.full(score.shape, count > 0, device=score.device)
    # The value that the last one kept has, rather than an order of all, whose places take eight bytes each.
    place = len(flat) - count
    if flat.device.type == "cpu":
        last = torch.from_numpy(np.partition(flat.numpy(), place))[place]
    else:
        last = torch.sort(flat).values[place]
    mask = flat > last
    equal = (flat == last).nonzero()[:, 0]
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(score.shape)


Choose = Callable[[Tensor, int], Tensor]


def obs_prune(weight: Tensor, gram: Tensor, choose: Choose, step: int, damping: float) -> tuple[Tensor, Tensor]:
    """Prune columns from left to right; what a pruned value did is taken over by the columns to its right (SparseGPT).

    Parameters
    ----------
    weight
        (m, n).
    gram
        (n, n).
    choose
        Given saliencies ``w² / U_jj²`` (columns, m) of the next columns and the number of the first one, marks what is
        kept.
    step
        How many columns are chosen at a time.
    damping
        Added to the diagonal of the Gram matrix, as a fraction of its mean.

    Returns
    -------
    The pruned weight and its mask, both (m, n).

    Notes
    -----
    Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023). Row j of U, the
    upper Cholesky factor of the inverse of H, is the first row of the inverse of what is left of H from column j on,
    divided by the root of its first entry: the optimal brain surgeon's step restricted to the columns that follow.
    Inputs that the data never shows are not zeroed as in the published code: they are pruned first, and those that are
    kept stay as they are.
    """
    m, n = weight.shape
    held = torch.promote_types(weight.dtype, torch.float32)
    upper = inverse_factor(gram.to(weight.device), damping, dead=_DEAD, dtype=held)
    rows = wide(weight).T.contiguous()  # a column of the weight is a row here: contiguous
    if rows.data_ptr() == weight.data_ptr():
        rows = rows.clone()
    pivots = upper.diagonal().unsqueeze(1)
    mask = torch.empty_like(rows, dtype=torch.bool)
    block = step * max(1, _BLOCK // step)
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = rows.new_empty(end - start, m)
        for j in range(start, end):
            if (j - start) % step == 0:
                ahead = slice(j, min(j + step, end))
                mask[ahead] = choose((rows[ahead] / pivots[ahead]).square(), j)
            error = torch.where(mask[j], 0, rows[j]) / pivots[j]
            errors[j - start] = error
            if j + 1 < end:
                rows[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        if end < n:
            rows[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    del upper, pivots
    return rows.masked_fill_(~mask, 0).T, mask.T
