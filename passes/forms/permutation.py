"""Permutations: features that change places, learned (an index for each) or fixed (a transposition of a grid)."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Cost, Operator, dtype_from_name, dtype_name
from recast.passes.forms.stats import Stats

__all__ = ["Permutation", "PermutationForm", "Reordering", "Shuffle"]


class Reordering(Operator):
    """An operator that moves features and changes no value; products with it are written out without multiplying."""

    applied: ClassVar[bool] = True

    @abc.abstractmethod
    def inverse(self) -> Operator:
        """Return the operator that moves every feature back."""


@dataclass(frozen=True, eq=False, repr=False)
class Permutation(Reordering):
    """y[i] = x[order[i]], with `order` (n,) int32 holding every index once."""

    kind: ClassVar[str] = "permutation"
    order: Tensor
    values: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.order.dim() != 1 or self.order.dtype != torch.int32:
            raise ValueError(
                f"permutation: an order (n,) of int32 is needed, not {tuple(self.order.shape)} of {self.order.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.order.shape[0], self.order.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.values

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def to_dense(self) -> Tensor:
        return torch.eye(self.shape[0], dtype=self.values, device=self.order.device).index_select(0, self.order)

    def inverse(self) -> Permutation:
        return Permutation(self.order.argsort().to(torch.int32), self.values)

    def cost(self, tokens: int) -> Cost:
        return Cost(0, self.nbytes + 2 * self.shape[0] * tokens * self.values.itemsize)

    def own_tensors(self) -> dict[str, Tensor]:
        # Not `order`: modules that hold an operator keep the order of their own features under that name.
        return {"places": self.order}

    def fields(self) -> dict[str, Any]:
        return {"values": dtype_name(self.values)}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["places"], dtype_from_name(fields["values"]))

    def to(self, dtype: torch.dtype) -> Permutation:
        return Permutation(self.order, dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Shuffle(Reordering):
    """Features read as a grid (rows, columns) and given column by column: y[j, i] = x[i, j].

    Each cell of the grid holds `width` features, which stay together.
    """

    kind: ClassVar[str] = "shuffle"
    rows: int
    columns: int
    values: torch.dtype = torch.float32
    width: int = 1

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns, self.width)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"shuffle: a grid of {sizes}; three positive whole numbers would work")

    @property
    def shape(self) -> tuple[int, int]:
        size = self.rows * self.columns * self.width
        return (size, size)

    @property
    def dtype(self) -> torch.dtype:
        return self.values

    def apply(self, x: Tensor) -> Tensor:
        grid = x.reshape(*x.shape[:-1], self.rows, self.columns, self.width)
        return grid.transpose(-2, -3).reshape(*x.shape[:-1], self.shape[0])

    def to_dense(self) -> Tensor:
        # Rows of the identity, moved as values of a vector are: the transpose of the inverse, which is the matrix.
        return self.inverse().apply(torch.eye(self.shape[0], dtype=self.values))

    def inverse(self) -> Shuffle:
        return Shuffle(self.columns, self.rows, self.values, self.width)

    def cost(self, tokens: int) -> Cost:
        return Cost(0, 2 * self.shape[0] * tokens * self.values.itemsize)

    def fields(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "columns": self.columns,
            "width": self.width,
            "values": dtype_name(self.values),
        }

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(fields["rows"], fields["columns"], dtype_from_name(fields["values"]), fields["width"])

    def to(self, dtype: torch.dtype) -> Shuffle:
        return Shuffle(self.rows, self.columns, dtype, self.width)


@dataclass(frozen=True)
class PermutationForm(NamedForm):
    """W ≈ P, a permutation matrix: one whole number for each feature, no arithmetic.

    As a whole weight it is a curiosity; as a factor it brings features together, as in
    ``permutation @ block_diagonal(4) @ permutation``.

    Notes
    -----
    Every permutation keeps the size of its input, so ``‖(W - P) X‖²`` is a constant less twice ``⟨W G, P⟩``: a linear
    assignment problem, solved exactly (Jonker and Volgenant 1987, by scipy).

    Examples
    --------
    >>> PermutationForm().fit(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).order.tolist()
    [1, 0]
    """

    name: ClassVar[str] = "permutation"
    summary: ClassVar[str] = "features that change places: the nearest permutation matrix"
    optimal_on_data: ClassVar[bool] = True

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def wrapper(self) -> bool:
        return True

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()] if shape[0] == shape[1] else []

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        return None if shape[0] == shape[1] else ("is not square", f"{(min(shape),) * 2} would")

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Permutation:
        return Permutation(torch.empty(shape[0], dtype=torch.int32, device="meta"), dtype)

    def solve(self, weight: Tensor, stats: Stats | None) -> Permutation:
        import scipy.optimize

        gain = weight.double().cpu()
        if stats is not None and stats.gram is not None:
            gain = gain @ stats.gram.double().cpu()
        _, order = scipy.optimize.linear_sum_assignment(gain.numpy(), maximize=True)
        return Permutation(torch.from_numpy(order).to(weight.device, torch.int32), weight.dtype)
