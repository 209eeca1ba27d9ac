"""How integer weights are made: scales, zero points and codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recast.kernels.quantized_matmul import reference
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.rounding import compensated, integer_snap
from recast.passes.forms.stats import Stats, less_error, row_errors

__all__ = ["fit_quantized"]

# Fractions of the range that are tried where clipping the largest values may pay: with four bits it does.
_SHRINK = (1.0, 0.95, 0.9, 7 / 8, 0.825, 0.775, 0.725, 0.675)
# Rows are fitted a slab at a time, so that temporaries stay in the cache and memory stays small.
_SLAB = 1 << 18


def fit_quantized(
    weight: Tensor,
    stats: Stats | None,
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    activations: bool = False,
    per_token: bool = True,
    reduce_range: bool = False,
    rounding: str = "nearest",
    act_order: bool = False,
    per_tensor: bool = False,
    clip: bool = True,
) -> Quantized:
    """Round a weight (m, n) to integers, choosing each group's scale for the least error.

    Without `clip` a scale comes from the largest value alone: plain rounding to nearest, in a third of the time.

    With `per_tensor` (and no group) one scale is chosen for all of the matrix.

    With statistics, errors are weighted by the mean square of each input when scales are chosen, and each row keeps
    those scales only if they are the better ones under the whole Gram matrix: never worse on the data than without
    statistics. With another `rounding` than "nearest" (see `recast.passes.forms.rounding`) each row then takes what that
    one finds, again only if it is better. GPTQ chooses the scales of a group when it comes to it, from what the weights
    have become by then; with `act_order` all scales are those of plain rounding.
    """
    m, n = weight.shape
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device)
    importance = None
    coarse = clip and (bits < 8 or reduce_range)
    if gram is not None and coarse:
        importance = gram.diagonal().clamp_min(0)
        importance = importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    if per_tensor:
        shared = _scale_of_all(weight, gram, importance, bits, symmetric, reduce_range, clip)
    parts = []
    step = max(1, _SLAB // n)
    for start in range(0, m, step):
        rows = weight[start : start + step]
        # The scales are at least float32, whatever the weight is.
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        weightings = [None] if importance is None else [None, importance]
        if per_tensor:
            scale, zero = shared
        else:
            (scale, zero), *other = _scales(rows, bits, group, symmetric, weightings, reduce_range, clip)
            if other:
                scale, zero = _better(rows, gram, bits, group, (scale, zero), other[0], reduce_range)
        values = reference.quantize(rows, scale, zero, bits=bits, group=group, reduce_range=reduce_range)
        parts.append((values, scale, zero))
    values = torch.cat([values for values, _, _ in parts])
    if per_tensor:
        scale, zero = shared
    else:
        scale = torch.cat([scale for _, scale, _ in parts])
        zeros = [zero for _, _, zero in parts if zero is not None]
        zero = torch.cat(zeros) if zeros else None
    if rounding != "nearest" and gram is not None:
        values, scale, zero = _compensated(
            weight, gram, values, scale, zero, bits, group, rounding, act_order, reduce_range, importance, clip
        )
    return Quantized(values, scale, zero, bits, group, (m, n), activations, weight.dtype, per_token)


_Scales = tuple[Tensor, Tensor | None]


def _slabs(m: int, n: int) -> list[slice]:
    """Cut the rows of a matrix (m, n) into stretches of `_SLAB` values."""
    step = max(1, _SLAB // n)
    return [slice(start, min(start + step, m)) for start in range(0, m, step)]


def _compensated(
    weight: Tensor,
    gram: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int | None,
    rounding: str,
    act_order: bool,
    reduce_range: bool,
    importance: Tensor | None,
    clip: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round with the data, beginning with the codes and scales of plain rounding."""
    n = weight.shape[1]
    width = n if group is None else group
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # A group's scales as columns next to each other in memory: (groups, m).
    steps = scale.T.contiguous()
    offsets = torch.zeros_like(steps) if zero is None else zero.T.to(steps.dtype).contiguous()

    def choose(start: int, stop: int, columns: Tensor) -> None:
        part = None if importance is None else importance[start:stop]
        ((found, offset),) = _scales(columns, bits, None, zero is None, [part], reduce_range, clip)
        steps[start // width] = found[:, 0]
        if offset is not None:
            offsets[start // width] = offset[:, 0].to(steps.dtype)

    def nearest(rows: slice) -> Tensor:
        # One scale stands for all rows, or each has its own.
        mine = rows if len(scale) > 1 else slice(None)
        offset = None if zero is None else zero[mine]
        return reference.dequantize(values[rows], scale[mine], offset, bits=bits, group=group, features=n)

    snap = integer_snap(steps, offsets, width, reference.code_range(bits, zero is None, reduce_range))
    # One group a row is there before its first input is rounded: nothing to choose anew.
    anew = None if act_order or width >= n else choose
    found, take = compensated(
        wide, gram, nearest, snap, rounding=rounding, group=group, choose=anew, act_order=act_order
    )
    new_scale = steps.T.contiguous()
    new_zero = None if zero is None else offsets.T.to(zero.dtype).contiguous()
    parts = []
    for rows in _slabs(*found.shape):
        mine = rows if len(new_scale) > 1 else slice(None)
        offset = None if new_zero is None else new_zero[mine]
        part = found[rows]
        parts.append(
            reference.quantize(part, new_scale[mine], offset, bits=bits, group=group, reduce_range=reduce_range)
        )
    codes = torch.cat(parts)
    take = take.unsqueeze(1)
    if len(scale) < len(weight):  # one for all rows, which no rounding has changed
        return torch.where(take, codes, values), scale, zero
    return (
        torch.where(take, codes, values),
        torch.where(take, new_scale, scale),
        None if zero is None or new_zero is None else torch.where(take, new_zero, zero),
    )


def _scales(
    weight: Tensor,
    bits: int,
    group: int | None,
    symmetric: bool,
    importances: Sequence[Tensor | None],
    reduce_range: bool = False,
    clip: bool = True,
) -> list[_Scales]:
    """Choose scale and zero point of each group, (m, groups), for the least squared error over clippings.

    Once for each weighting of the errors by input; None weighs all the same.
    """
    m, n = weight.shape
    groups = reference.group_count(n, group)
    width = n if group is None or groups == 1 else group
    extra = groups * width - n
    # Zeros that fill the last group round to zero and change neither range nor error.
    grouped = torch.nn.functional.pad(weight, (0, extra)).reshape(m, groups, width)
    low, high = reference.code_range(bits, symmetric, reduce_range)
    if symmetric:
        top = grouped.abs().amax(-1)
        bottom = -top
        step = top / high
    else:
        top, bottom = grouped.amax(-1).clamp_min(0), grouped.amin(-1).clamp_max(0)
        step = (top - bottom) / (high - low)
    plain = (step, _zero(bottom, step, low, high, symmetric))
    if not clip or (bits == 8 and not reduce_range):
        # Eight bits leave nothing to gain from clipping.
        return [_finish(plain, bits)] * len(importances)
    weights = [
        None
        if each is None
        else torch.nn.functional.pad(each.to(weight.dtype).sqrt(), (0, extra)).reshape(groups, width)
        for each in importances
    ]
    best = [plain] * len(weights)
    least = [torch.full_like(step, torch.inf)] * len(weights)
    gap = torch.empty_like(grouped)
    for shrink in _SHRINK:
        scale = step * shrink
        zero = _zero(bottom * shrink, scale, low, high, symmetric)
        torch.div(grouped, torch.where(scale == 0, 1, scale).unsqueeze(-1), out=gap).round_()
        # The range moves in place of all codes.
        first: Any
        last: Any
        first, last = (low, high) if zero is None else ((low - zero).unsqueeze(-1), (high - zero).unsqueeze(-1))
        gap.clamp_(first, last).mul_(scale.unsqueeze(-1)).sub_(grouped)
        for i, weighting in enumerate(weights):
            error = torch.linalg.vector_norm(gap if weighting is None else gap * weighting, dim=-1)
            better = error < least[i]
            least[i] = torch.where(better, error, least[i])
            old = best[i][1]
            best[i] = (
                torch.where(better, scale, best[i][0]),
                None if zero is None or old is None else torch.where(better, zero, old),
            )
    return [_finish(found, bits) for found in best]


def _scale_of_all(
    weight: Tensor,
    gram: Tensor | None,
    importance: Tensor | None,
    bits: int,
    symmetric: bool,
    reduce_range: bool,
    clip: bool,
) -> _Scales:
    """Choose one scale and zero point for a whole matrix, (1, 1), as `_scales` does for groups, a slab of rows at a time."""
    n, wide = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
    low, high = reference.code_range(bits, symmetric, reduce_range)
    top, bottom = weight.amax().to(wide).clamp_min(0), weight.amin().to(wide).clamp_max(0)
    if symmetric:
        top = torch.maximum(top, -bottom)
        bottom = -top
    whole = ((top / high) if symmetric else (top - bottom) / (high - low)).reshape(1, 1)
    tried = []
    for shrink in _SHRINK if clip and (bits < 8 or reduce_range) else (1.0,):
        step = whole * shrink
        tried.append(_finish((step, _zero(bottom.reshape(1, 1) * shrink, step, low, high, symmetric)), bits))
    if len(tried) == 1:
        return tried[0]

    def errors(candidates: Sequence[_Scales], measures: Sequence[Tensor | None]) -> list[list[float]]:
        """Squared error of each candidate, by weights of the inputs or under a Gram matrix."""
        total = [[0.0] * len(candidates) for _ in measures]
        for rows in weight.split(max(1, _SLAB // n)):  # type: ignore[no-untyped-call]
            rows = rows.to(wide)
            for i, (scale, zero) in enumerate(candidates):
                found = reference.rounded(rows, scale, zero, bits=bits, group=None, reduce_range=reduce_range)
                gap = rows - found
                for sums, measure in zip(total, measures, strict=True):
                    if measure is not None and measure.dim() == 1:
                        sums[i] += float((gap.double().square().sum(0) * measure).sum())
                    else:
                        sums[i] += float(row_errors(gap, measure).sum())
        return total

    weightings = [None] if importance is None else [None, importance]
    best = [min(range(len(tried)), key=found.__getitem__) for found in errors(tried, weightings)]
    if best[0] == best[-1]:
        return tried[best[0]]
    pair = [tried[best[0]], tried[best[1]]]
    ((first, second),) = errors(pair, [gram])
    return pair[second < first]


def _zero(bottom: Tensor, scale: Tensor, low: int, high: int, symmetric: bool) -> Tensor | None:
    if symmetric:
        return None
    return (low - torch.round(bottom / torch.where(scale == 0, 1, scale))).clamp(low, high)


def _finish(best: _Scales, bits: int) -> _Scales:
    scale, zero = best
    return scale, None if zero is None else zero.to(torch.int8 if bits == 8 else torch.uint8)


def _better(
    weight: Tensor,
    gram: Tensor | None,
    bits: int,
    group: int | None,
    first: _Scales,
    second: _Scales,
    reduce_range: bool = False,
) -> _Scales:
    """Take, row by row, whichever scales give the smaller error under the Gram matrix."""
    one, other = (
        weight - reference.rounded(weight, scale, zero, bits=bits, group=group, reduce_range=reduce_range)
        for scale, zero in (first, second)
    )
    take = less_error(other, one, gram).unsqueeze(1)
    zero = None if first[1] is None or second[1] is None else torch.where(take, second[1], first[1])
    return torch.where(take, second[0], first[0]), zero
