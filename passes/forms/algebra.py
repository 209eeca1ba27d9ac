"""Operators made of operators: products, sums, rows stacked and blocks on a diagonal."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.diagonal import Diagonal
from recast.passes.forms.operator import Cost, Operator, Refit
from recast.passes.forms.permutation import Reordering
from recast.passes.forms.stats import Stats

__all__ = ["DirectSum", "Product", "RowStack", "Sum"]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@dataclass(frozen=True, eq=False, repr=False)
class Product(Operator):
    """y = left(right(x)); to_dense() = left @ right."""

    kind: ClassVar[str] = "product"
    left: Operator
    right: Operator

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"product: left takes {self.left.shape[1]} features but right gives {self.right.shape[0]}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.left.dtype, self.right.dtype)

    def apply(self, x: Tensor) -> Tensor:
        return self.left.apply(self.right.apply(x))

    def to_dense(self) -> Tensor:
        if self.left.applied:
            return self.left.apply(self.right.to_dense().to(self.dtype).T).T
        if isinstance(self.right, Reordering):
            return self.right.inverse().apply(self.left.to_dense().to(self.dtype))
        if isinstance(self.right, Diagonal) and self.right.rows == self.right.columns:
            return self.right.apply(self.left.to_dense().to(self.dtype))  # its own transpose
        left, right = self.left.to_dense(), self.right.to_dense()
        # Processors without products of 16-bit numbers take a hundred times as long for them as for float32.
        half = self.dtype in (torch.bfloat16, torch.float16) and left.device.type == "cpu"
        wide = torch.float32 if half else self.dtype
        return (left.to(wide) @ right.to(wide)).to(self.dtype)

    def cost(self, tokens: int) -> Cost:
        return self.right.cost(tokens) + self.left.cost(tokens)

    def children(self) -> dict[str, Operator]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(children["left"], children["right"])

    def to(self, dtype: torch.dtype) -> Product:
        return Product(self.left.to(dtype), self.right.to(dtype))

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        # The right factor sees x; the left one sees what the refitted right factor makes of it.
        right = self.right.refit(fit, stats, _join(path, "right"))
        after = None if stats is None else stats.through(right)
        return Product(self.left.refit(fit, after, _join(path, "left")), right)


class _Many(Operator):
    """Shared by the operators that hold a tuple of others, named 0, 1, ..."""

    parts: tuple[Operator, ...]

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.parts[0].dtype
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    def children(self) -> dict[str, Operator]:
        return {str(index): part for index, part in enumerate(self.parts)}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        parts = tuple(children[str(index)] for index in range(len(children)))
        return cls(parts)  # type: ignore[call-arg]

    def to(self, dtype: torch.dtype) -> Operator:
        return type(self)(tuple(part.to(dtype) for part in self.parts))  # type: ignore[call-arg]

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        parts = (
            part.refit(fit, self._seen_by(index, stats), _join(path, str(index)))
            for index, part in enumerate(self.parts)
        )
        return type(self)(tuple(parts))  # type: ignore[call-arg]

    def _seen_by(self, index: int, stats: Stats | None) -> Stats | None:
        return stats

    def _nonempty(self) -> None:
        if not self.parts:
            raise ValueError(f"{self.kind}: at least one part is needed")


@dataclass(frozen=True, eq=False, repr=False)
class Sum(_Many):
    """y = Σ parts(x); every part has the same shape."""

    kind: ClassVar[str] = "sum"
    parts: tuple[Operator, ...]

    def __post_init__(self) -> None:
        self._nonempty()
        if len({part.shape for part in self.parts}) != 1:
            raise ValueError(f"sum: the terms differ in shape: {[part.shape for part in self.parts]}")

    @property
    def terms(self) -> tuple[Operator, ...]:
        """The operators that are added."""
        return self.parts

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def apply(self, x: Tensor) -> Tensor:
        y = self.parts[0].apply(x)
        for part in self.parts[1:]:
            y = y + part.apply(x)
        return y

    def to_dense(self) -> Tensor:
        dense = self.parts[0].to_dense().to(self.dtype)
        for part in self.parts[1:]:
            dense = dense + part.to_dense().to(self.dtype)
        return dense

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        total = Cost(m * tokens * (len(self.parts) - 1), 0)
        for part in self.parts:
            total = total + part.cost(tokens)
        # The terms read the same x once and write one y.
        return Cost(total.flops, total.bytes - (len(self.parts) - 1) * (m + n) * tokens * self.dtype.itemsize)


@dataclass(frozen=True, eq=False, repr=False)
class RowStack(_Many):
    """y = cat(parts(x), -1): the rows of a packed weight, each part in a form of its own."""

    kind: ClassVar[str] = "row_stack"
    parts: tuple[Operator, ...]

    def __post_init__(self) -> None:
        self._nonempty()
        if len({part.shape[1] for part in self.parts}) != 1:
            raise ValueError(f"row_stack: the parts take different inputs: {[part.shape for part in self.parts]}")

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([part.apply(x) for part in self.parts], -1)

    def to_dense(self) -> Tensor:
        return torch.cat([part.to_dense().to(self.dtype) for part in self.parts], 0)

    def cost(self, tokens: int) -> Cost:
        total = Cost(0, 0)
        for part in self.parts:
            total = total + part.cost(tokens)
        return Cost(total.flops, total.bytes - (len(self.parts) - 1) * self.shape[1] * tokens * self.dtype.itemsize)


@dataclass(frozen=True, eq=False, repr=False)
class DirectSum(_Many):
    """y = cat(parts[i](i-th slice of x), -1): blocks on a diagonal that are operators themselves."""

    kind: ClassVar[str] = "direct_sum"
    parts: tuple[Operator, ...]

    def __post_init__(self) -> None:
        self._nonempty()

    @property
    def shape(self) -> tuple[int, int]:
        return (sum(part.shape[0] for part in self.parts), sum(part.shape[1] for part in self.parts))

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([part.apply(x[..., self._slice(i)]) for i, part in enumerate(self.parts)], -1)

    def to_dense(self) -> Tensor:
        dense = self.parts[0].to_dense().new_zeros(self.shape, dtype=self.dtype)
        row = 0
        for i, part in enumerate(self.parts):
            dense[row : row + part.shape[0], self._slice(i)] = part.to_dense().to(self.dtype)
            row += part.shape[0]
        return dense

    def cost(self, tokens: int) -> Cost:
        total = Cost(0, 0)
        for part in self.parts:
            total = total + part.cost(tokens)
        return total

    def _slice(self, index: int) -> slice:
        start = sum(part.shape[1] for part in self.parts[:index])
        return slice(start, start + self.parts[index].shape[1])

    def _seen_by(self, index: int, stats: Stats | None) -> Stats | None:
        return None if stats is None else stats.part(self._slice(index))
