"""Integer weights: the operator, and how scales and zero points are chosen."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul import reference
from recast.passes.forms.operator import Cost, Operator, dtype_from_name, dtype_name, matmul_cost
from recast.passes.forms.rounding import compensated, integer_snap
from recast.passes.forms.stats import Stats, row_errors

__all__ = ["Quantized", "fit_quantized", "outline_quantized"]


@dataclass(frozen=True, eq=False, repr=False)
class Quantized(Operator):
    """A weight (m, n) as integer codes, ``(code - zero) * scale`` with one scale for each group of a row's inputs.

    Attributes
    ----------
    values
        int8 (m, n); below eight bits uint8 (m, bytes), codes packed by `reference.pack_codes`: for four bits two a byte,
        the even input in the low half.
    scale
        (m, groups) floating; (1, 1) where all of the matrix shares one.
    zero
        Of the same shape, int8 or below eight bits uint8; None for symmetric codes (the middle code, for four bits 8, is zero).
    bits
        2, 3, 4 or 8.
    group
        Inputs in a group, the last group of a row may be shorter; None for one group a row.
    full_shape
        (m, n).
    activations
        Whether `apply` also rounds its inputs to int8 as they come ("W8A8", dynamic).
    per_token
        Whether each input vector then has a scale and zero point of its own; else all vectors share one pair.
    compute
        The floating dtype of `to_dense`.
    """

    kind: ClassVar[str] = "quantized"
    values: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int | None
    full_shape: tuple[int, int]
    activations: bool = False
    compute: torch.dtype = field(default=torch.float32)
    per_token: bool = True

    def __post_init__(self) -> None:
        m, n = self.full_shape
        reference.code_range(self.bits, self.zero is None)
        columns = reference.packed_bytes(n, self.bits)
        groups = reference.group_count(n, self.group)
        shared = self.group is None and tuple(self.scale.shape) == (1, 1)
        expected = {"values": (m, columns), "scale": (1, 1) if shared else (m, groups)}
        if self.zero is not None:
            expected["zero"] = expected["scale"]
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"quantized: {name} has shape {tuple(getattr(self, name).shape)}, {shape} is needed")
        if self.activations and self.bits != 8:
            raise ValueError(f"quantized: activations are rounded for 8 bit weights only, not for {self.bits}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.full_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    @property
    def symmetric(self) -> bool:
        """Whether the codes have no zero point."""
        return self.zero is None

    def by_row(self) -> Quantized:
        """Return the same weight with a scale for each row also where one stands for the whole matrix, as kernels take it."""
        m = self.full_shape[0]
        if self.scale.shape[0] == m:
            return self
        zero = None if self.zero is None else self.zero.expand(m, 1).contiguous()
        return replace(self, scale=self.scale.expand(m, 1).contiguous(), zero=zero)

    def apply(self, x: Tensor) -> Tensor:
        if not self.activations:
            return reference.dequantizing_matmul(
                x, self.values, self.scale, self.zero, bits=self.bits, group=self.group
            )
        if x.requires_grad and torch.is_grad_enabled():
            # Rounding has no slope; its gradient is taken as that of the identity ("straight through").
            codes, scale, zero = reference.quantize_tokens(x.detach(), per_token=self.per_token)
            rounded = x + (((codes.to(scale.dtype) - zero) * scale).to(x.dtype) - x).detach()
            return torch.nn.functional.linear(rounded, self.to_dense().to(x.dtype))
        return reference.dynamic_int8_matmul(
            x, self.values, self.scale, self.zero, group=self.group, per_token=self.per_token
        )

    def to_dense(self) -> Tensor:
        return reference.dequantize(
            self.values,
            self.scale,
            self.zero,
            bits=self.bits,
            group=self.group,
            features=self.full_shape[1],
            dtype=self.compute,
        )

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        return matmul_cost(self.shape, 2 * m * n * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        found = {"values": self.values, "scale": self.scale}
        return found if self.zero is None else {**found, "zero": self.zero}

    def fields(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "shape": list(self.full_shape),
            "symmetric": self.symmetric,
            "activations": self.activations,
            "per_token": self.per_token,
            "dtype": dtype_name(self.compute),
        }

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        m, n = fields["shape"]
        return cls(
            tensors["values"],
            tensors["scale"],
            None if fields["symmetric"] else tensors["zero"],
            int(fields["bits"]),
            None if fields["group"] is None else int(fields["group"]),
            (int(m), int(n)),
            bool(fields["activations"]),
            dtype_from_name(fields["dtype"]),
            bool(fields["per_token"]),
        )

    def to(self, dtype: torch.dtype) -> Quantized:
        return replace(self, compute=dtype)


# Fractions of the range that are tried where clipping the largest values may pay: with four bits it does.
_SHRINK = (1.0, 0.95, 0.9, 7 / 8, 0.825, 0.775, 0.725, 0.675)
# Rows are fitted a slab at a time, so that temporaries stay in the cache and memory stays small.
_SLAB = 1 << 19


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
) -> Quantized:
    """Round a weight (m, n) to integers, choosing each group's scale for the least error.

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
    coarse = bits < 8 or reduce_range
    if gram is not None and coarse:
        importance = gram.diagonal().clamp_min(0)
        importance = importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    if per_tensor:
        shared = _scale_of_all(weight, gram, importance, bits, symmetric, reduce_range)
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
            (scale, zero), *other = _scales(rows, bits, group, symmetric, weightings, reduce_range)
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
            weight, gram, values, scale, zero, bits, group, rounding, act_order, reduce_range, importance
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round with the data, beginning with the codes and scales of plain rounding."""
    n = weight.shape[1]
    width = n if group is None else group
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    nearest = reference.dequantize(values, scale, zero, bits=bits, group=group, features=n)
    # A group's scales as columns next to each other in memory: (groups, m).
    steps = scale.T.contiguous()
    offsets = torch.zeros_like(steps) if zero is None else zero.T.to(steps.dtype).contiguous()

    def choose(start: int, stop: int, columns: Tensor) -> None:
        part = None if importance is None else importance[start:stop]
        ((found, offset),) = _scales(columns, bits, None, zero is None, [part], reduce_range)
        steps[start // width] = found[:, 0]
        if offset is not None:
            offsets[start // width] = offset[:, 0].to(steps.dtype)

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
        # One scale stands for all rows, or each has its own.
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
    if bits == 8 and not reduce_range:
        # Eight bits leave nothing to gain from clipping.
        return [_finish(plain, bits)] * len(importances)
    weights = [
        None if each is None else torch.nn.functional.pad(each.to(weight.dtype), (0, extra)).reshape(groups, width)
        for each in importances
    ]
    best = [plain] * len(weights)
    least = [torch.full_like(step, torch.inf)] * len(weights)
    for shrink in _SHRINK:
        scale = step * shrink
        zero = _zero(bottom * shrink, scale, low, high, symmetric)
        codes = torch.round(grouped / torch.where(scale == 0, 1, scale).unsqueeze(-1))
        offset = 0 if zero is None else zero.unsqueeze(-1)
        codes = (codes + offset).clamp_(low, high) - offset
        gap = codes.mul_(scale.unsqueeze(-1)).sub_(grouped).square_()
        for i, weighting in enumerate(weights):
            error = gap.sum(-1) if weighting is None else (gap * weighting).sum(-1)
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
    for shrink in _SHRINK if bits < 8 or reduce_range else (1.0,):
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
    errors = []
    for scale, zero in (first, second):
        found = reference.rounded(weight, scale, zero, bits=bits, group=group, reduce_range=reduce_range)
        errors.append(row_errors(weight - found, gram))
    take = (errors[1] < errors[0]).unsqueeze(1)
    zero = None if first[1] is None or second[1] is None else torch.where(take, second[1], first[1])
    return torch.where(take, second[0], first[0]), zero


def outline_quantized(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    activations: bool = False,
    per_token: bool = True,
    per_tensor: bool = False,
) -> Quantized:
    """Return what `fit_quantized` would make, on the meta device."""
    m, n = shape
    scales = (1, 1) if per_tensor else (m, reference.group_count(n, group))
    code = torch.int8 if bits == 8 else torch.uint8
    return Quantized(
        torch.empty(m, reference.packed_bytes(n, bits), dtype=code, device="meta"),
        torch.empty(scales, dtype=torch.promote_types(dtype, torch.float32), device="meta"),
        None if symmetric else torch.empty(scales, dtype=code, device="meta"),
        bits,
        group,
        shape,
        activations,
        dtype,
        per_token,
    )
