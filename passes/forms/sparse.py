"""What the sparse operators share: values that are an operator of their own, and a dense matrix they are written out to."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.sparse_matmul import reference
from recast.passes.forms.operator import Cost, Operator, Refit, matmul_cost
from recast.passes.forms.stats import Stats

__all__ = ["Sparse", "reference"]


class Sparse(Operator):
    """A weight (m, n) of which few values are held, in `values`; targets without a sparse product write it out."""

    values: Operator

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.to_dense().to(x.dtype))

    def cost(self, tokens: int) -> Cost:
        rows, columns = self.values.shape
        return matmul_cost(self.shape, 2 * rows * columns * tokens, self.nbytes, self.dtype, tokens)

    def children(self) -> dict[str, Operator]:
        return {"values": self.values}

    def with_values(self, values: Operator) -> Operator:
        """Return the same places holding other values."""
        return type(self).build(self.fields(), self.own_tensors(), {"values": values})

    def to(self, dtype: torch.dtype) -> Operator:
        return self.with_values(self.values.to(dtype))

    def seen_by_values(self, stats: Stats) -> Stats | None:
        """Return what is known of the data that the packed values meet, None if nothing is."""
        return None

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        seen = None if stats is None or stats.gram is None else self.seen_by_values(stats)
        return self.with_values(self.values.refit(fit, seen, f"{path}.values" if path else "values"))
