"""`recast::round_rows` and `recast::rounded_linear`: int8 products on a CPU with VNNI as operations of a graph.

Rounding is an operation of its own, so that products of one vector share it; and `recast::rounded_linear_codes` rounds what it
makes, for a product that reads nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul import rounded_rows

__all__ = ["round_rows", "rounded_linear", "rounded_linear_codes"]


@torch.library.custom_op("recast::round_rows", mutates_args=())
def round_rows(x: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round vectors to unsigned bytes, as `rounded_rows.round_rows` says.

    Examples
    --------
    >>> codes, grid = round_rows(torch.tensor([[-1.0, 0.0, 1.55]]), None)
    >>> codes.tolist(), grid.tolist()
    ([[0, 100, 255, 0]], [[0.009999999776482582, 100.0]])
    """
    codes, found = rounded_rows.round_rows(x, grid)
    return codes, found.clone() if grid is not None else found


@round_rows.register_fake
def _(x: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], rounded_rows.held_features(x.shape[-1])), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], 2) if grid is None else (2,), dtype=torch.float32)


@torch.library.custom_op("recast::rounded_linear", mutates_args=())
def rounded_linear(
    codes: Tensor,
    grid: Tensor,
    weights: Tensor,
    scale: Tensor,
    sums: Tensor,
    outputs: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "",
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply rounded vectors by an int8 weight, and go on with the sums: see `rounded_rows.multiply`.

    Parameters
    ----------
    codes, grid
        Of `round_rows`.
    weights, scale, sums, outputs
        As `rounded_rows.multiply` takes them.
    dtype
        float32 or bfloat16, of the result, and of `factor` and `residual`.
    bias
        (outputs,), floating.
    activation, factor, residual
        What follows, in this order.

    Returns
    -------
    (..., outputs) in `dtype`.
    """
    y, _ = rounded_rows.multiply(
        codes, grid, weights, scale, sums, outputs, bias=_filled(bias, scale), activation=activation, factor=factor,
        residual=residual, dtype=dtype,
    )  # fmt: skip
    return y


@rounded_linear.register_fake
def _(
    codes: Tensor,
    grid: Tensor,
    weights: Tensor,
    scale: Tensor,
    sums: Tensor,
    outputs: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "",
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], outputs), dtype=dtype)


@torch.library.custom_op("recast::rounded_linear_codes", mutates_args=())
def rounded_linear_codes(
    codes: Tensor,
    grid: Tensor,
    weights: Tensor,
    scale: Tensor,
    sums: Tensor,
    outputs: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
    factor: Tensor | None,
    residual: Tensor | None,
    next_grid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Do what `rounded_linear` does and round the result at once, from float32, as `round_rows` would with `next_grid`."""
    made, found = rounded_rows.multiply(
        codes, grid, weights, scale, sums, outputs, bias=_filled(bias, scale), activation=activation, factor=factor,
        residual=residual, dtype=dtype, rounded=True, next_grid=next_grid,
    )  # fmt: skip
    assert found is not None
    return made, found.clone() if next_grid is not None else found


@rounded_linear_codes.register_fake
def _(
    codes: Tensor,
    grid: Tensor,
    weights: Tensor,
    scale: Tensor,
    sums: Tensor,
    outputs: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    activation: str,
    factor: Tensor | None,
    residual: Tensor | None,
    next_grid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lead = codes.shape[:-1]
    made = codes.new_empty((*lead, rounded_rows.held_features(outputs)))
    return made, grid.new_empty((*lead, 2) if next_grid is None else (2,))


def _filled(bias: Tensor | None, scale: Tensor) -> Tensor | None:
    return None if bias is None else torch.nn.functional.pad(bias.float(), (0, len(scale) - len(bias)))
