"""The meaning of a product with gated inputs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cuts_of", "gated_matmul", "keeps"]


def cuts_of(x: Tensor, norms: Tensor | None, kept: int) -> Tensor:
    """Return the score of each vector's `kept`-th largest input, (tokens,), for vectors (tokens, n).

    Examples
    --------
    >>> cuts_of(torch.tensor([[3.0, -1.0, 2.0]]), None, 2).tolist()
    [2.0]
    """
    return torch.topk(_scores(x, norms), kept, dim=-1, sorted=False).values.amin(-1)


def keeps(x: Tensor, norms: Tensor | None, kept: int, threshold: float | None) -> Tensor:
    """Say which inputs of (..., n) count: bool; with a threshold scores above it, else those not below the `kept`-th largest."""
    scores = _scores(x, norms)
    if threshold is not None:
        return scores > threshold
    return scores >= torch.topk(scores, kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def gated_matmul(
    x: Tensor,
    columns: Tensor,
    norms: Tensor | None,
    kept: int,
    threshold: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply vectors, of which only some inputs count, by a weight.

    Parameters
    ----------
    x
        (..., n).
    columns
        (n, m): the weight's columns.
    norms
        (n,), at least float32: scores are ``|x_j| norms_j``. None: ``|x_j|``.
    kept, threshold
        See `keeps`.
    bias
        (m,) or None.

    Returns
    -------
    (..., m), ``(x ⊙ keep(x)) columns + bias``.

    Examples
    --------
    >>> columns = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    >>> gated_matmul(torch.tensor([4.0, 1.0, -5.0]), columns, None, kept=2).tolist()
    [-11.0, -110.0]
    """
    counted = torch.where(keeps(x, norms, kept, threshold), x, 0)
    return torch.nn.functional.linear(counted, columns.T, bias)


def _scores(x: Tensor, norms: Tensor | None) -> Tensor:
    scores = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return scores if norms is None else scores * norms.to(scores.dtype)
