"""Weights that are looked up in tables: the operator, and rounding to a table that is given."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.codebook_matmul import reference
from recast.kernels.quantized_matmul.reference import group_count, pack_codes, packed_bytes, spread
from recast.passes.forms.operator import Cost, Operator, dtype_from_name, dtype_name, matmul_cost
from recast.passes.forms.rounding import compensated
from recast.passes.forms.stats import Stats, row_errors

__all__ = ["Codebook", "fit_table", "outline_table"]


@dataclass(frozen=True, eq=False, repr=False)
class Codebook(Operator):
    """A weight (m, n) as codes that name entries of a table; groups of a row's inputs may have a scale.

    Attributes
    ----------
    values
        uint8 (m, bytes): a code of `bits` bits for each `dim` inputs of a row, packed.
    table
        (row blocks, column blocks, 2^bits, dim) floating: one table for each block that the matrix is cut into.
    scale
        (m, groups) floating; int8 where scales are coded; None without scales.
    step, mean
        Of coded scales: see `reference.code_scales`.
    bits
        1 to 8.
    group
        Inputs that share a scale, the last group of a row may be shorter; None for one a row.
    full_shape
        (m, n).
    compute
        The floating dtype of `to_dense`.
    """

    kind: ClassVar[str] = "codebook"
    values: Tensor
    table: Tensor
    scale: Tensor | None
    step: Tensor | None
    mean: Tensor | None
    bits: int
    group: int | None
    full_shape: tuple[int, int]
    compute: torch.dtype = field(default=torch.float32)

    def __post_init__(self) -> None:
        m, n = self.full_shape
        if self.table.dim() != 4 or self.table.shape[2] != 2**self.bits:
            raise ValueError(
                f"codebook: table has shape {tuple(self.table.shape)}, (.., .., {2**self.bits}, ..) is needed"
            )
        expected: dict[str, tuple[int, ...]] = {"values": (m, packed_bytes(-(-n // self.table.shape[3]), self.bits))}
        if self.scale is not None:
            expected["scale"] = (m, group_count(n, self.group))
        if (self.step is None) != (self.mean is None) or (self.step is not None and self.scale is None):
            raise ValueError("codebook: coded scales need scale, step and mean together")
        if self.step is not None:
            expected["step"] = (-(-m * group_count(n, self.group) // reference.SUPER_BLOCK),)
            expected["mean"] = (1,)
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"codebook: {name} has shape {tuple(getattr(self, name).shape)}, {shape} is needed")

    @property
    def shape(self) -> tuple[int, int]:
        return self.full_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weight().to(x.dtype))

    def to_dense(self) -> Tensor:
        return self._weight().to(self.compute)

    def _weight(self) -> Tensor:
        scale = self.scale
        if scale is not None and self.step is not None and self.mean is not None:
            scale = reference.decode_scales(scale, self.step, self.mean)
        return reference.lookup(
            self.values, self.table, scale, bits=self.bits, group=self.group, features=self.full_shape[1]
        )

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        return matmul_cost(self.shape, 2 * m * n * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("values", "table", "scale", "step", "mean")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def fields(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "shape": list(self.full_shape),
            "scaled": self.scale is not None,
            "coded_scales": self.step is not None,
            "dtype": dtype_name(self.compute),
        }

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        m, n = fields["shape"]
        return cls(
            tensors["values"],
            tensors["table"],
            tensors["scale"] if fields["scaled"] else None,
            tensors["step"] if fields["coded_scales"] else None,
            tensors["mean"] if fields["coded_scales"] else None,
            int(fields["bits"]),
            None if fields["group"] is None else int(fields["group"]),
            (int(m), int(n)),
            dtype_from_name(fields["dtype"]),
        )

    def to(self, dtype: torch.dtype) -> Codebook:
        return replace(self, compute=dtype)


# Rows are rounded a slab at a time, so that temporaries stay small.
_SLAB = 1 << 19
# A search by the error of the output tries fewer scales where each is much work, but not fewer than these; to round a value
# takes about as long as so many multiplications.
_WORK, _FEWEST, _LOOK_UP = 5e10, 8, 1000


def fit_table(
    weight: Tensor,
    stats: Stats | None,
    table: Tensor,
    *,
    bits: int,
    group: int | None,
    double: bool = False,
    rounding: str = "nearest",
    act_order: bool = False,
    tops: Sequence[float] = (1.0,),
) -> Codebook:
    """Round a weight (m, n) to ``table * scale``, the scale of a group being its largest absolute value, or a share of it.

    Parameters
    ----------
    weight, stats
        As in `Form.fit`; statistics serve `rounding` other than "nearest".
    table
        (2^bits,), the largest absolute value being 1.
    bits, group
        Of a code; inputs in a group, None for a row.
    double
        Code the scales in eight bits as well.
    rounding, act_order
        See `recast.passes.forms.rounding`. Each row keeps the better of plain rounding and this one.
    tops
        Shares of the largest absolute value that are tried as scales, beside that value itself; the one of the least squared
        error is kept. With statistics it is the error of the row's output, group after group, and no row ends above what it
        has without data or without a search.
    """
    m, n = weight.shape
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    width = n if group is None or group_count(n, group) == 1 else group
    table = table.to(wide)
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device)
    before, scale = _scales(wide, table, group, width, gram, tops)
    compensates = rounding != "nearest" and gram is not None
    if not compensates:
        before = scale
    elif double:  # coded together, all rows have the same kind
        scale = before
    held: tuple[Tensor, Tensor | None, Tensor | None] = (scale, None, None)
    if double:
        codes, step, mean = reference.code_scales(scale)
        held, scale = (codes, step, mean), reference.decode_scales(codes, step, mean)
        before = scale
    safe = torch.where(scale == 0, 1, scale)
    rows = max(1, _SLAB // n)
    picked = torch.cat(
        [
            reference.nearest_codes(wide[at : at + rows] / spread(safe[at : at + rows], n, group), table).to(
                torch.uint8
            )
            for at in range(0, m, rows)
        ]
    )
    if compensates and gram is not None:
        # Scales that were fitted to the errors of plain rounding are none the better for errors that others make up for.
        safe = torch.where(before == 0, 1, before)
        steps = safe.T.contiguous()

        def snap(j: int, column: Tensor) -> Tensor:
            step = steps[j // width]
            return table[reference.nearest_codes(column / step, table)] * step

        plain = picked

        def nearest(rows: slice) -> Tensor:
            return table[plain[rows].long()] * spread(scale[rows], n, group)

        found, take = compensated(
            wide, gram, nearest, snap, rounding=rounding, group=group, choose=None, act_order=act_order
        )
        anew = reference.nearest_codes(found / spread(safe, n, group), table).to(torch.uint8)
        picked = torch.where(take.unsqueeze(1), anew, picked)
        if not double:
            held = (torch.where(take.unsqueeze(1), before, scale), None, None)
    return Codebook(pack_codes(picked, bits), table.reshape(1, 1, -1, 1), *held, bits, group, (m, n), weight.dtype)


def _scales(
    weight: Tensor, table: Tensor, group: int | None, width: int, gram: Tensor | None, tops: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Choose the scale of each group, (m, groups), a slab of rows at a time: by weights of inputs, and by the whole row's output."""
    m, n = weight.shape
    extra = group_count(n, group) * width - n
    importance = None
    if gram is not None and len(tops) > 1:
        importance = gram.diagonal().clamp_min(0)
        importance = (importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)).to(weight.dtype)
        importance = torch.nn.functional.pad(importance, (0, extra)).reshape(1, -1, width)
    parts = []
    step = max(1, _SLAB // n)
    for start in range(0, m, step):
        rows = weight[start : start + step]
        grouped = torch.nn.functional.pad(rows, (0, extra)).reshape(len(rows), -1, width)
        largest = grouped.abs().amax(-1)
        if len(tops) == 1:
            parts.append((largest * tops[0],) * 2)
            continue
        scale, _ = _searched(grouped, largest, table, None, tops)
        if importance is not None and gram is not None:
            other, totals = _searched(grouped, largest, table, importance, tops)
            tried = [scale, other, largest]
            errors = torch.stack([row_errors(rows - _levels(rows, each, table, group), gram) for each in tried])
            best = errors.argmin(0)  # of equal ones the first
            scale = torch.stack(tried).gather(0, best.expand(1, -1).unsqueeze(-1).expand(1, -1, scale.shape[1]))[0]
            few = max(_FEWEST, int(_WORK / (2 * m * n * (width + _LOOK_UP))))
            promising = [tops[i] for i in totals.argsort(stable=True)[:few].tolist()]
            parts.append((scale, _descended(rows, scale, largest, table, group, width, gram, promising)))
        else:
            parts.append((scale, scale))
    return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])


def _levels(rows: Tensor, scale: Tensor, table: Tensor, group: int | None) -> Tensor:
    """What rows (m, n) are rounded to with scales (m, groups)."""
    each = spread(torch.where(scale == 0, 1, scale), rows.shape[1], group)
    return table[reference.nearest_codes(rows / each, table)] * each


def _searched(
    grouped: Tensor, largest: Tensor, table: Tensor, importance: Tensor | None, tops: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The best scale among the largest value and shares of it, for groups (m, groups, width); and the error of each share.

    Once a group is sorted, a scale's error is a matter of as many look-ups in running sums as there are levels.
    """
    ordered, places = (t.contiguous() for t in torch.sort(grouped.double(), -1))
    weights = (
        torch.ones_like(ordered) if importance is None else importance.double().expand_as(ordered).gather(-1, places)
    )
    nothing = ordered.new_zeros(*ordered.shape[:-1], 1)
    mass, moment = (torch.cat([nothing, t.cumsum(-1)], -1) for t in (weights, weights * ordered))
    square = (weights * ordered.square()).sum(-1)
    levels = torch.unique(table.double())
    between = (levels[1:] + levels[:-1]) / 2
    end = torch.full(nothing.shape, ordered.shape[-1], dtype=torch.int64, device=grouped.device)
    best, least, totals = largest, torch.full_like(square, torch.inf), []
    for top in (1.0, *tops):
        scale = (largest * top).double()
        cuts = torch.searchsorted(ordered, (scale.unsqueeze(-1) * between).contiguous())
        edges = torch.cat([torch.zeros_like(end), cuts, end], -1)
        held, sums = (t.gather(-1, edges).diff(dim=-1) for t in (mass, moment))
        # Of the numbers that one level stands for: sum of w (x - level scale)^2.
        error = square - 2 * scale * (sums @ levels) + scale.square() * (held @ levels.square())
        better = error < least
        best, least = torch.where(better, scale.to(largest.dtype), best), torch.where(better, error, least)
        totals.append((error / torch.where(square > 0, square, 1)).sum())
    return best, torch.stack(totals[1:])


def _descended(
    rows: Tensor,
    scale: Tensor,
    largest: Tensor,
    table: Tensor,
    group: int | None,
    width: int,
    gram: Tensor,
    tops: Sequence[float],
) -> Tensor:
    """Choose the scales anew, group after group, by what a row's output errs with all groups; never by more than it did.

    Where a group's values change by d, the error ``eᵀ G e`` of a row changes by ``2 dᵀ (G e) + dᵀ G d``.
    """
    wide = rows.double()
    held = _levels(rows, scale, table, group)
    pull = (wide - held.double()) @ gram.double()
    found = scale.clone()
    for i, start in enumerate(range(0, rows.shape[1], width)):
        part = slice(start, start + width)
        own = gram[part, part].double()
        least = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        moved = torch.zeros_like(wide[:, part])
        for top in tops:
            tried = largest[:, i : i + 1] * top
            change = (held[:, part] - _levels(rows[:, part], tried, table, None)).double()
            error = ((2 * pull[:, part] + change @ own) * change).sum(1)
            better = (error < least).unsqueeze(1)
            least = torch.minimum(error, least)
            moved = torch.where(better, change, moved)
            found[:, i : i + 1] = torch.where(better, tried, found[:, i : i + 1])
        pull += moved @ gram[part].double()
    return found


def outline_table(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    bits: int,
    group: int | None = None,
    double: bool = False,
    scaled: bool = True,
    tables: tuple[int, int] = (1, 1),
    dim: int = 1,
) -> Codebook:
    """Return what a fit to tables would make, on the meta device."""
    m, n = shape
    groups = group_count(n, group)
    wide = torch.promote_types(dtype, torch.float32)

    def empty(*size: int, kind: torch.dtype = wide) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    return Codebook(
        empty(m, packed_bytes(-(-n // dim), bits), kind=torch.uint8),
        empty(*tables, 2**bits, dim),
        empty(m, groups, kind=torch.int8 if double else wide) if scaled else None,
        empty(-(-m * groups // reference.SUPER_BLOCK)) if double else None,
        empty(1) if double else None,
        bits,
        group,
        shape,
        dtype,
    )
