"""Attention by its definition, in the dtype of what is given."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_weights", "by_head"]


def by_head(k: Tensor, heads: int) -> Tensor:
    """Repeat key heads (b, g, s, d) for the queries' heads that share them: (b, heads, s, d).

    Examples
    --------
    >>> by_head(torch.arange(2.0).reshape(1, 2, 1, 1), 4).flatten().tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """What each query takes of each key, ``softmax(scale q kᵀ + mask)``; zeros where it may see none.

    Parameters
    ----------
    q, k
        (b, h, l, d), (b, g, s, d); g divides h.
    mask
        Added, or bool: True is seen; broadcasts to (b, h, l, s).
    causal
        Query i sees keys 0 to i.
    scale
        Of the products.

    Returns
    -------
    (b, h, l, s).

    Examples
    --------
    >>> q = torch.zeros(1, 1, 2, 4)
    >>> attention_weights(q, q, None, True, 0.5)[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    scores = q @ by_head(k, q.shape[1]).mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    none = scores.amax(-1, keepdim=True) == -torch.inf
    return torch.where(none, 0, torch.softmax(torch.where(none, 0, scores), -1))
