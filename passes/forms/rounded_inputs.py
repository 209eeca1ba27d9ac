"""Inputs that are rounded to a small float format, token by token, before they meet a weight."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.floats import FloatGrid, float_tokens, rounded_product
from recast.passes.forms.operator import Cost, Operator, Refit, holds, stripped
from recast.passes.forms.stats import Stats

__all__ = ["RoundedInputs", "rounds_to_floats", "unrounded"]

# Normal vectors that stand for the data where none of it was kept.
_DRAWN = 64


@dataclass(frozen=True, eq=False, repr=False)
class RoundedInputs(Operator):
    """``y = W R(x)``: each input vector is rounded to a float format over its own range, found as it comes ("dynamic").

    `to_dense` is the matrix without the rounding: `apply` is linear only up to it. Products add up in float32 whatever the
    dtype of the inputs, as they do where hardware multiplies the format.

    Attributes
    ----------
    weight
        (m, n), of any kind.
    grid
        The format.
    """

    kind: ClassVar[str] = "rounded_inputs"
    weight: Operator
    grid: FloatGrid

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def apply(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            # Rounding has no slope; its gradient is taken as that of the identity ("straight through").
            return self.weight.apply(x + (self.rounded(x.detach()) - x).detach())
        return rounded_product(x, self.grid, self.weight.apply)

    def rounded(self, x: Tensor) -> Tensor:
        """Return what x (..., n) is rounded to, in its dtype."""
        values, scale = float_tokens(x, self.grid)
        return (values * scale).to(x.dtype)

    def to_dense(self) -> Tensor:
        return self.weight.to_dense()

    def cost(self, tokens: int) -> Cost:
        return self.weight.cost(tokens)

    def children(self) -> dict[str, Operator]:
        return {"weight": self.weight}

    def fields(self) -> dict[str, Any]:
        return {"mantissa": self.grid.mantissa, "lowest": self.grid.lowest, "largest": self.grid.largest}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        grid = FloatGrid(int(fields["mantissa"]), int(fields["lowest"]), float(fields["largest"]))
        return cls(children["weight"], grid)

    def to(self, dtype: torch.dtype) -> RoundedInputs:
        return RoundedInputs(self.weight.to(dtype), self.grid)

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        return RoundedInputs(self.weight.refit(fit, stats, f"{path}.weight" if path else "weight"), self.grid)

    def lost(self, stats: Stats, after: Tensor | None = None) -> float:
        """Expect the squares that rounding the inputs adds to the output, over all tokens.

        Measured on the sample, or without one on independent normal inputs of the sizes that the Gram matrix has; 0 where
        neither is known.

        Parameters
        ----------
        stats
            Of the inputs.
        after
            What the output is multiplied by, (l, m).
        """
        dense = self.to_dense().detach().double()
        x = stats.sample
        if x is None or not len(x):
            if stats.gram is None:
                return 0.0
            size = (stats.gram.diagonal().double().clamp_min(0) / max(1, stats.tokens)).sqrt().cpu()
            x = size * torch.randn(_DRAWN, len(size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.double().to(dense.device)
        gap = (self.rounded(x) - x) @ dense.T
        gap = gap if after is None else gap @ after.T
        return float(gap.square().sum()) / len(x) * stats.tokens


def rounds_to_floats(operator: Operator) -> bool:
    """Whether anything in an operator rounds its inputs to a float format."""
    return holds(operator, RoundedInputs)


def unrounded(operator: Operator) -> Operator:
    """Return the same operator without rounding to float formats: the linear map whose matrix `to_dense` is."""
    return stripped(operator, RoundedInputs)
