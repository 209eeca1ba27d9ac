"""Rounding that looks at the data: each value makes up for what the others lost (GPTQ, QuantEase).

Both work on any grid: a `snap` gives the nearest value that the grid holds for one input of all rows. Rows do not meet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recast.passes.forms.linear_algebra import inverse_factor, scaled_copy
from recast.passes.forms.stats import less_error

__all__ = [
    "ROUNDINGS",
    "Choose",
    "Snap",
    "compensated",
    "gptq",
    "integer_snap",
    "quantease",
    "sweep",
    "unit_gram",
    "unrounded",
]

ROUNDINGS = ("nearest", "gptq", "quantease")

# The nearest values of the grid, (m,), for input j of every row, (m,).
Snap = Callable[[int, Tensor], Tensor]
# Chooses the grid of the inputs start..stop from what they hold now, (m, stop - start).
Choose = Callable[[int, int, Tensor], None]

# Inputs that are rounded before the rest hears of it, which is then one product of matrices.
_BLOCK = 128
# Rows whose errors are compared at once.
_ROWS = 256
# Published settings: damping of 1 % of the mean diagonal; thirty passes, of which every third but the last leaves values
# unrounded.
_DAMPING = 0.01
_PASSES = 30
# Units of rounding by which an error must fall to count as lower.
_NOISE = 64


def integer_snap(steps: Tensor, offsets: Tensor, width: int, codes: tuple[int, int]) -> Snap:
    """Snap to integers: steps and zero points (groups, m) of each `width` inputs, looked up when a value is asked for."""

    def snap(j: int, column: Tensor) -> Tensor:
        step, offset = steps[j // width], offsets[j // width]
        found = torch.round(column / torch.where(step == 0, 1, step)).add_(offset).clamp_(*codes)
        return found.sub_(offset).mul_(step)

    return snap


def gptq(
    weight: Tensor,
    gram: Tensor,
    snap: Snap,
    *,
    group: int | None = None,
    choose: Choose | None = None,
    act_order: bool = False,
    damping: float = _DAMPING,
) -> Tensor:
    """Round input after input, each time moving the inputs still to come so that they make up for it.

    With ``H = G + damping mean(diag G)`` and ``H⁻¹ = Uᵀ U`` (U upper triangular), rounding input j of a row by e moves the
    later ones by ``-(e / U_jj) U[j, j+1:]``: the exact minimiser of ``d H dᵀ`` over the inputs that are still free.

    Parameters
    ----------
    weight
        (m, n), float32 or float64.
    gram
        (n, n), of the inputs.
    snap
        The grid.
    group, choose
        Inputs whose grid is chosen together, when the first of them is reached; None: the grid is there already.
    act_order
        Round the inputs of the largest mean square first.
    damping
        Share of the mean diagonal that is added.

    Returns
    -------
    Tensor
        (m, n), values of the grid.

    Notes
    -----
    Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022).
    """
    m, n = weight.shape
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n)
    # An input that is always zero may be rounded as it likes, and moves nothing.
    upper = inverse_factor(gram[order][:, order] if act_order else gram, damping, dead=1.0, dtype=weight.dtype)
    left = weight.T[order] if act_order else weight.T.clone(memory_format=torch.contiguous_format)  # inputs come first
    places = order.tolist()
    width = n if group is None else group
    for start, stop in _blocks(n, width if choose is not None else n):
        errors = left.new_empty(stop - start, m)
        for j in range(start, stop):
            if choose is not None and j % width == 0:
                choose(j, min(j + width, n), left[j : j + width].T)
            rounded = snap(places[j], left[j])
            errors[j - start] = (left[j] - rounded) / upper[j, j]
            left[j] = rounded
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        if stop < n:
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return left[torch.argsort(order)].T if act_order else left.T


def _blocks(n: int, group: int) -> list[tuple[int, int]]:
    """Cut n inputs into stretches of about `_BLOCK`, so that a group begins a stretch or lies within one."""
    size = max(1, _BLOCK // group) * group
    cuts = [(at, min(at + size, n)) for at in range(0, n, size)]
    return [(at, min(at + _BLOCK, stop)) for start, stop in cuts for at in range(start, stop, _BLOCK)]


def quantease(weight: Tensor, gram: Tensor, start: Tensor, snap: Snap, *, passes: int = _PASSES) -> Tensor:
    """Round each input anew to what is best while all others stay, over and over (coordinate descent).

    For input j of a row the best value is ``u = ŵ_j + ((w - ŵ) G)_j / G_jj``, and the nearest of the grid to u the best of
    the grid: no pass raises ``‖(W - Ŵ) X‖``. Every third pass leaves u as it is, to come out of local minima; each row keeps
    the best rounded values that were met, so that none is worse than its start.

    Parameters
    ----------
    weight, start
        (m, n): what is approximated, and values of the grid.
    gram
        (n, n), of the inputs.
    snap
        The grid.
    passes
        At most so many; fewer where three in a row bring nothing.

    Returns
    -------
    Tensor
        (m, n), values of the grid.

    Notes
    -----
    Behdin et al., QuantEase: Optimization-based Quantization for Language Models (2023).
    """
    g = unit_gram(gram, weight.dtype)
    target, current = weight.T.contiguous(), start.T.contiguous().clone()  # of one row, they would be views
    best, errors = current.clone(), _errors(target - current, g)
    least = errors
    # Errors are carried along; what they lack by rounding would otherwise pass for a gain, and no round for the last.
    gain = 1 - _NOISE * torch.finfo(weight.dtype).eps
    since = 0
    for number in range(passes):
        free = unrounded(number, passes)
        errors = errors - sweep(target, current, g, None if free else snap)
        if free:
            continue
        better = errors < least * gain
        since = 0 if bool(better.any()) else since + 1
        best, least = torch.where(better, current, best), torch.where(better, errors, least)
        if since == 3:
            break
    return best.T


def unit_gram(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a Gram matrix with a mean diagonal of 1, in the dtype that products with it are taken in."""
    return scaled_copy(gram, gram.diagonal().mean(), dtype)


def unrounded(number: int, passes: int) -> bool:
    """Whether this pass of coordinate descent leaves values unrounded: every third, but not the last or a late one."""
    return number % 3 == 1 and number < passes - 1 and number <= 25


def sweep(target: Tensor, current: Tensor, g: Tensor, snap: Snap | None) -> Tensor:
    """Change each input of `current` (n, m), in place, to what is best for `target` while all others stay.

    The nearest of the grid to it, or it itself without a grid. Inputs that the data never shows stay. Returns by how much the
    squared error of each row fell, (m,) float64, which is known on the way and would cost another product with G.
    """
    diagonal = g.diagonal().tolist()
    fallen = torch.zeros(target.shape[1], dtype=torch.float64, device=target.device)
    for first in range(0, len(target), _BLOCK):
        block = slice(first, first + _BLOCK)
        # (W - Ŵ) G of the block's inputs, kept up to date within the block.
        slope = g[block] @ (target - current)
        for j in range(first, min(first + _BLOCK, len(target))):
            if diagonal[j] <= 0:
                continue
            wanted = current[j] + slope[j - first] / diagonal[j]
            if snap is not None:
                wanted = snap(j, wanted)
            step, pull = wanted - current[j], slope[j - first]
            # (e - d)ᵀG(e - d) is less than eᵀG e by 2 d (G e)_j - d² G_jj where d is in one place.
            fallen += step * (2 * pull - diagonal[j] * step)
            slope.addr_(g[block, j], step, alpha=-1)
            current[j] = wanted
    return fallen


def _errors(gap: Tensor, g: Tensor) -> Tensor:
    return ((g @ gap) * gap).sum(0, dtype=torch.float64)


def compensated(
    weight: Tensor,
    gram: Tensor,
    nearest: Callable[[slice], Tensor],
    snap: Snap,
    *,
    rounding: str,
    group: int | None,
    choose: Choose | None,
    act_order: bool,
) -> tuple[Tensor, Tensor]:
    """Round by GPTQ, and on from there by QuantEase where `rounding` says so.

    `nearest` gives some rows of what plain rounding makes, (k, n).

    Returns
    -------
    values, take
        (m, n) of the grid, and (m,) whether the row is better on the data than `nearest`, what plain rounding gives.
    """
    found = gptq(weight, gram, snap, group=group, choose=choose, act_order=act_order)
    if rounding == "quantease":
        found = quantease(weight, gram, found, snap)
    take = []
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = weight[rows].double()
        take.append(less_error(wide - found[rows], wide - nearest(rows), gram))
    return found, torch.cat(take)
