"""The meaning of gates, in plain torch: which inputs of a vector count."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cuts_of", "gated"]


def cuts_of(x: Tensor, norms: Tensor | None, kept: int) -> Tensor:
    """Return the score of each vector's `kept`-th largest input, (tokens,), for vectors (tokens, n).

    Examples
    --------
    >>> cuts_of(torch.tensor([[3.0, -1.0, 2.0]]), None, 2).tolist()
    [2.0]
    """
    return torch.topk(_scores(x, norms), kept, dim=-1, sorted=False).values.amin(-1)


def gated(x: Tensor, norms: Tensor | None, cut: Tensor | float, *, strictly: bool) -> Tensor:
    """Return x (..., n) with zeros for inputs whose score is below a cut, or `strictly` not above it.

    Examples
    --------
    >>> gated(torch.tensor([3.0, -1.0, 2.0]), None, 2.0, strictly=False).tolist()
    [3.0, 0.0, 2.0]
    """
    scores = _scores(x, norms)
    return torch.where(scores > cut if strictly else scores >= cut, x, 0)


def _scores(x: Tensor, norms: Tensor | None) -> Tensor:
    scores = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return scores if norms is None else scores * norms.to(scores.dtype)
