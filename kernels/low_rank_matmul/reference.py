"""The meaning of a product with a weight of low rank, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank_matmul"]


def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply vectors by ``left right`` without writing that product out.

    Parameters
    ----------
    x
        (..., n).
    left, right
        (m, rank), (rank, n).
    bias
        (m,) or None.

    Returns
    -------
    (..., m), ``(x rightᵀ) leftᵀ + bias``.

    Examples
    --------
    >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> low_rank_matmul(torch.tensor([1.0, 1.0, 0.0]), left, right).tolist()
    [7.0, 14.0]
    """
    linear = torch.nn.functional.linear
    return linear(linear(x, right), left, bias)
