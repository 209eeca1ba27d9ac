"""Weights that share a few values, found by clustering."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import pack_codes
from recast.passes.forms.codebook import Codebook, outline_table
from recast.passes.forms.form import NamedForm
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["KMeans", "cluster_values"]

# Rounds at most, and numbers that are clustered at once where there are many tables.
_ROUNDS = 100
_SLAB = 1 << 20
# More numbers than this under one table are counted in so many bins before they are clustered.
_MANY, _BINS = 1 << 22, 1 << 20


def cluster_values(values: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """Find `count` centres of each row of numbers (T, L), by Lloyd's rounds from the quantiles: (T, count) ascending, float64.

    Sorted numbers and their running sums make a round a matter of `count` look-ups. Where there are no more than `count`
    different numbers, these are the centres.

    Parameters
    ----------
    values, weights
        (T, L); weights of the squared errors, None for equal ones.
    count
        How many centres.

    Examples
    --------
    >>> cluster_values(torch.tensor([[0.0, 0.1, 1.0, 1.1, 1.2]]), None, 2).tolist()
    [[0.05..., 1.1...]]
    """
    x, order = torch.sort(values.double(), dim=-1, stable=True)
    w = torch.ones_like(x) if weights is None else weights.double().gather(-1, order)
    w = torch.where((w > 0).any(-1, keepdim=True), w, 1)
    start = x.new_zeros(len(x), 1)
    mass, moment = torch.cat([start, w.cumsum(-1)], -1), torch.cat([start, (w * x).cumsum(-1)], -1)
    total, last = mass[:, -1:], x.shape[1]
    shares = (torch.arange(count, dtype=x.dtype, device=x.device) + 0.5) / count
    centres = x.gather(-1, torch.searchsorted(mass[:, 1:].contiguous(), total * shares).clamp_max(last - 1))
    # Rows with few different numbers: the places where a new one begins, the last one repeated.
    new = torch.cat([torch.ones_like(x[:, :1], dtype=torch.bool), x[:, 1:] != x[:, :-1]], -1)
    rank = new.cumsum(-1)
    few = rank[:, -1:] <= count
    wanted = torch.arange(1, count + 1, device=x.device).expand(len(x), -1)
    firsts = torch.searchsorted(rank, torch.minimum(wanted, rank[:, -1:]).contiguous())
    centres = torch.where(few, x.gather(-1, firsts), centres)
    ends = torch.full((len(x), 1), last, dtype=torch.int64, device=x.device)
    for _ in range(_ROUNDS):
        cuts = torch.searchsorted(x, (centres[:, 1:] + centres[:, :-1]) / 2)
        edges = torch.cat([torch.zeros_like(ends), cuts, ends], -1)
        held, sums = (t.gather(-1, edges).diff(dim=-1) for t in (mass, moment))
        # (A centre that has lost its numbers stays where it is; running sums of tiny weights may cancel to nothing.)
        moved = torch.where((held > 1e-12 * total) & ~few, sums / torch.where(held > 0, held, 1), centres)
        moved = torch.sort(moved, -1).values
        if bool((moved == centres).all()):
            break
        centres = moved
    return centres


def _binned(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and masses of the numbers (m, n) in bins of equal width, (1, bins) float64: sorting all would take 50 bytes of each.

    A cut within a bin is as good as one at its edge, to the millionth part of the range that a bin is wide.
    """
    low, high = values.min().double(), values.max().double()
    width = torch.where(high > low, (high - low) / _BINS, 1)
    mass = torch.zeros(_BINS, dtype=torch.float64, device=values.device)
    moment = torch.zeros_like(mass)
    for rows in values.split(max(1, _SLAB // values.shape[1])):  # type: ignore[no-untyped-call]
        x = rows.double()
        w = torch.ones_like(x) if importance is None else importance.double().expand_as(x)
        bins = ((x - low) / width).long().clamp_(0, _BINS - 1).flatten()
        mass += torch.bincount(bins, w.flatten(), minlength=_BINS)
        moment += torch.bincount(bins, (w * x).flatten(), minlength=_BINS)
    there = mass > 0
    return (moment[there] / mass[there]).unsqueeze(0), mass[there].unsqueeze(0)


@dataclass(frozen=True)
class KMeans(NamedForm):
    """``W[i, j] ≈ table[code]`` with the 2^bits values of least squared error, of the whole weight or of a few rows each.

    With data, errors are weighted by the mean square of each input, so that the table serves inputs that are large.

    Notes
    -----
    The look-up form of Cho et al., eDKM (2023), and with ``rows=1`` and data that of Kim et al., SqueezeLLM (2023), whose
    weights are Fisher's. Clusters are found once, without training.

    Examples
    --------
    >>> operator = KMeans(bits=1).fit(torch.tensor([[1.0, 1.0, 3.0], [3.0, 3.0, 1.0]]))
    >>> operator.table.flatten().tolist(), operator.to_dense().tolist()
    ([1.0, 3.0], [[1.0, 1.0, 3.0], [3.0, 3.0, 1.0]])
    """

    name: ClassVar[str] = "kmeans"
    summary: ClassVar[str] = "codes of a few bits for values found by clustering"

    bits: int = field(default=4, metadata={"help": "of a code: the table has 2^bits values"})
    rows: int | None = field(default=None, metadata={"help": "rows that share a table; none: all of them"})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormError(f"kmeans: bits is {self.bits}; 1 to 8 would work")
        if self.rows is not None and self.rows < 1:
            raise FormError(f"kmeans: rows is {self.rows}, not positive; 1 would give each row a table")

    @property
    def dense_leaves(self) -> bool:
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(bits=3), cls(bits=2, rows=1)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(bits=bits) for bits in (1, 2, 4, 6)]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        if self.rows is None or shape[0] % self.rows == 0:
            return None
        below = next(rows for rows in range(min(self.rows, shape[0]), 0, -1) if shape[0] % rows == 0)
        return f"does not split into stretches of {self.rows} rows ({shape[0]} % {self.rows} != 0)", f"{below} would"

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Codebook:
        tables = 1 if self.rows is None else shape[0] // self.rows
        return outline_table(shape, dtype, bits=self.bits, scaled=False, tables=(tables, 1))

    def solve(self, weight: Tensor, stats: Stats | None) -> Codebook:
        m, n = weight.shape
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        rows = m if self.rows is None else self.rows
        importance = None
        if stats is not None and stats.gram is not None:
            importance = stats.gram.diagonal().to(weight.device).clamp_min(0)
            importance = importance if bool(importance.any()) else None
        tables, codes = [], []
        # So many tables at once that temporaries stay small.
        step = max(1, _SLAB // (rows * n)) * rows
        for start in range(0, m, step):
            part = wide[start : start + step].reshape(-1, rows * n)
            numbers: Tensor = part
            each: Tensor | None = None
            if rows * n > _MANY:
                numbers, each = _binned(wide[start : start + step], importance)
            elif importance is not None:
                each = importance.repeat(rows).expand(len(part), -1)
            found = cluster_values(numbers, each, 2**self.bits).to(wide.dtype)
            tables.append(found)
            between = ((found[:, 1:] + found[:, :-1]) / 2).contiguous()
            # Places take eight bytes each; of many tables at once there are few numbers under each.
            for some in part.split(_SLAB, 1) if len(part) == 1 else [part]:  # type: ignore[no-untyped-call]
                codes.append(torch.searchsorted(between, some.contiguous()).to(torch.uint8).flatten())
        return Codebook(
            pack_codes(torch.cat(codes).reshape(m, n), self.bits),
            torch.cat(tables).reshape(-1, 1, 2**self.bits, 1),
            None,
            None,
            None,
            self.bits,
            None,
            (m, n),
            weight.dtype,
        )
