"""The meaning of a product with values at any places, in plain torch: the weight is written out, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.unstructured_matmul.lanes import from_lanes

__all__ = ["unstructured_matmul"]


def unstructured_matmul(
    x: Tensor, values: Tensor, words: Tensor, starts: Tensor, offsets: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    """Multiply vectors (..., n) by a weight in lane order, ``x Wᵀ + bias``: (..., rows), in x's dtype.

    Examples
    --------
    >>> from recast.kernels.unstructured_matmul.lanes import to_lanes
    >>> held = to_lanes(torch.tensor([[0.0, 5.0], [7.0, 8.0]]))
    >>> unstructured_matmul(torch.tensor([[1.0, 2.0]]), *held, None, 2).tolist()
    [[10.0, 23.0]]
    """
    weight = from_lanes(values, words, starts, offsets, rows, x.shape[-1]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
