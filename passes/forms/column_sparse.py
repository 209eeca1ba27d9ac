"""Some of the input columns only."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import solve_consistent, times
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.pruning import scores
from recast.passes.forms.sparse import Sparse
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["ColumnSparse", "ColumnSparseForm"]


@dataclass(frozen=True, eq=False, repr=False)
class ColumnSparse(Sparse):
    """A weight (m, n) that reads `columns` of its inputs, y = values(x[columns]).

    Attributes
    ----------
    values
        (m, k), the columns that are held.
    columns
        int32 (k,), which inputs they are of, ascending.
    features
        n.
    """

    kind: ClassVar[str] = "column_sparse"
    values: Operator
    columns: Tensor
    features: int

    def __post_init__(self) -> None:
        if tuple(self.columns.shape) != (self.values.shape[1],) or self.columns.dtype != torch.int32:
            raise ValueError(
                f"column_sparse: columns are {self.columns.dtype} {tuple(self.columns.shape)}, "
                f"int32 ({self.values.shape[1]},) is needed"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.features)

    def apply(self, x: Tensor) -> Tensor:
        return self.values.apply(torch.index_select(x, -1, self.columns))

    def to_dense(self) -> Tensor:
        values = self.values.to_dense()
        return values.new_zeros(self.shape).index_copy(1, self.columns.to(torch.int64), values)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns}

    def fields(self) -> dict[str, Any]:
        return {"features": self.features}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(children["values"], tensors["columns"], int(fields["features"]))

    def seen_by_values(self, stats: Stats) -> Stats | None:
        columns = self.columns.to(torch.int64)
        return Stats(
            None if stats.gram is None else stats.gram[columns][:, columns],
            stats.mean[columns],
            stats.absmax[columns],
            stats.tokens,
            None if stats.sample is None else stats.sample[:, columns],
            ranges=None if stats.ranges is None else stats.ranges[:, columns],
        )


@dataclass(frozen=True)
class ColumnSparseForm(NamedForm):
    """``W' = V S`` with S picking k of the n inputs and V (m, k): k m values and k indices, and k/n of the work.

    Kept are the columns of the largest ``‖W_:,j‖ ‖X_j‖``. With data V is the least-squares solution on the kept inputs,
    which take over what those left out did as far as they predict them: ``W G Sᵀ (S G Sᵀ)⁺``.

    ``column_sparse(0.01) + int8`` keeps a few columns exactly and rounds what is left (the split of LLM.int8, Dettmers
    et al., 2022, with columns chosen once).

    Examples
    --------
    >>> form = ColumnSparseForm(0.5)
    >>> form.fit(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).to_dense().tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    name: ClassVar[str] = "column_sparse"
    summary: ClassVar[str] = "some of the input columns only, refitted on the data to stand for the others"

    density: float = field(metadata={"help": "share of the columns that is kept"})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise FormError(f"column_sparse: density is {self.density}, not in (0, 1]; 0.5 would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(0.4)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(density) for density in (0.1, 0.5, 0.9)]

    def kept(self, shape: tuple[int, int]) -> int:
        """Return how many columns of a weight (m, n) are kept: at least one."""
        return max(1, int(self.density * shape[1] + 0.5))

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> ColumnSparse:
        kept = self.kept(shape)
        values = torch.empty(shape[0], kept, dtype=dtype, device="meta")
        return ColumnSparse(Dense(values), torch.empty(kept, dtype=torch.int32, device="meta"), shape[1])

    def solve(self, weight: Tensor, stats: Stats | None) -> ColumnSparse:
        shape = (weight.shape[0], weight.shape[1])
        size = scores(weight, stats, "wanda").sum(0, dtype=torch.float64)
        columns = torch.sort(torch.sort(size, descending=True, stable=True).indices[: self.kept(shape)]).values
        values = weight[:, columns]
        if stats is not None and stats.gram is not None:
            gram = stats.gram.to(weight.device, torch.float64)
            # What the kept columns are short of on the data; where they see nothing they stay as they are.
            rest = weight.index_fill(1, columns, 0)
            met = times(rest, gram[:, columns])
            del rest
            values = (values.double() + solve_consistent(met, gram[columns.unsqueeze(1), columns])).to(weight.dtype)
        return ColumnSparse(Dense(values.contiguous()), columns.to(torch.int32), shape[1])
