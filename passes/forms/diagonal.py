"""Diagonal matrices: one factor for each feature."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Cost, Operator, matmul_cost
from recast.passes.forms.stats import Stats

__all__ = ["Diagonal", "DiagonalForm"]


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Operator):
    """y[i] = values[i] x[i]; features of the longer side that have no partner are dropped, or come out zero."""

    kind: ClassVar[str] = "diagonal"
    values: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != (min(self.rows, self.columns),):
            raise ValueError(f"diagonal: values {tuple(self.values.shape)} for a matrix ({self.rows}, {self.columns})")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def apply(self, x: Tensor) -> Tensor:
        kept = x[..., : self.rows] if self.rows < self.columns else x
        scaled = kept * self.values.to(x.dtype)
        return torch.nn.functional.pad(scaled, (0, self.rows - self.columns)) if self.rows > self.columns else scaled

    def to_dense(self) -> Tensor:
        square = torch.diag(self.values)
        size = self.values.shape[0]
        return torch.nn.functional.pad(square, (0, self.columns - size, 0, self.rows - size))

    def cost(self, tokens: int) -> Cost:
        return matmul_cost(self.shape, self.values.shape[0] * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def fields(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": self.columns}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["values"], fields["rows"], fields["columns"])

    def to(self, dtype: torch.dtype) -> Diagonal:
        return Diagonal(self.values.to(dtype), self.rows, self.columns)


@dataclass(frozen=True)
class DiagonalForm(NamedForm):
    """W ≈ diag(d): min(m, n) values, each feature for itself. Mostly a factor or a term of something else.

    With statistics ``d_i = (W G)_ii / G_ii``, the least-squares factor, which takes over what the other inputs say about
    output i as far as input i predicts it.

    Examples
    --------
    >>> DiagonalForm().fit(torch.tensor([[2.0, 1.0], [0.0, 3.0]])).values.tolist()
    [2.0, 3.0]
    """

    name: ClassVar[str] = "diagonal"
    summary: ClassVar[str] = "one factor for each feature, the least-squares best on the data"
    optimal_on_data: ClassVar[bool] = True

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def wrapper(self) -> bool:
        return True

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Diagonal:
        return Diagonal(torch.empty(min(shape), dtype=dtype, device="meta"), *shape)

    def solve(self, weight: Tensor, stats: Stats | None) -> Diagonal:
        m, n = weight.shape
        values = weight.diagonal()
        if stats is not None and stats.gram is not None:
            size = min(m, n)
            gram = stats.gram.to(weight.device, torch.float64)
            power = gram.diagonal()[:size]
            met = (weight[:size].double() * gram[:size]).sum(1)
            # A feature that the data never shows keeps its own factor.
            values = torch.where(power > 0, met / torch.where(power > 0, power, 1), values.double()).to(weight.dtype)
        return Diagonal(values.contiguous().clone(), m, n)
