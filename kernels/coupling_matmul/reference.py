"""The meaning of a coupling of groups, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coupling_matmul", "weights_gradient"]


def coupling_matmul(x: Tensor, weights: Tensor) -> Tensor:
    """Couple groups of r features each: ``y[i, f] = sum_j weights[i, j, f] x[j, f]``.

    Parameters
    ----------
    x
        (..., J r), one group after another.
    weights
        (I, J, r).

    Returns
    -------
    (..., I r).

    Examples
    --------
    >>> weights = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    >>> coupling_matmul(torch.tensor([1.0, 1.0, 3.0, 4.0]), weights).tolist()
    [31.0, 82.0]
    """
    to, of, rank = weights.shape
    # One product over the groups for each of the r features.
    groups = x.reshape(-1, of, rank).permute(2, 0, 1)
    y = torch.bmm(groups, weights.to(x.dtype).permute(2, 1, 0))
    return y.permute(1, 2, 0).reshape(*x.shape[:-1], to * rank)


def weights_gradient(x: Tensor, gradient: Tensor, rank: int) -> Tensor:
    """Return the gradient of weights (I, J, r), given vectors (tokens, J r) and the gradient of the result (tokens, I r)."""
    seen, wanted = (t.reshape(len(t), t.shape[1] // rank, rank).permute(2, 0, 1) for t in (x, gradient))
    return torch.bmm(wanted.transpose(1, 2), seen).permute(1, 2, 0)
