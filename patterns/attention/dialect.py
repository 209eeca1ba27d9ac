"""The dialect's attention: one function whose body is its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.sites import AttentionSite

__all__ = ["attention", "emit"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor, ...] = (),
    sinks: Tensor | None = None,
    *,
    kinds: tuple[str, ...] = (),
    fills: tuple[float, ...] = (),
    scale: float | None = None,
    softcap: float = 0.0,
    normaliser: str = "softmax",
    dtype: torch.dtype | None = None,
    fused: bool = False,
    grouped: bool = False,
) -> Tensor:
    """``normalise(sinks(mask(softcap(scale · query · key)))) · value``.

    Parameters
    ----------
    query
        (..., queries, d).
    key
        (..., d, keys), transposed already; if `fused`, (..., keys, d).
    value
        (..., keys, e).
    masks, kinds, fills
        Applied in order: ``add`` adds a mask, ``keep`` puts the fill where a boolean mask is false, ``drop`` where it is true,
        ``causal`` (fused only) needs no mask.
    sinks
        (..., queries, 1) logits that take part in the normalisation only.
    scale
        1/√d by default.
    softcap
        Scores are bounded as ``softcap · tanh(scores / softcap)``; 0 if not.
    normaliser
        ``softmax``, ``sigmoid`` or ``relu``.
    dtype
        In which the scores are normalised; that of the query by default.
    fused
        Take `torch.nn.functional.scaled_dot_product_attention`, whose rows without any key are zero.
    grouped
        Fewer heads in key and value than in query (fused only).

    Examples
    --------
    >>> import torch
    >>> q, k, v = torch.ones(1, 2, 4), torch.ones(1, 4, 3), torch.arange(6.0).reshape(1, 3, 2)
    >>> attention(q, k, v, scale=0.5).tolist()
    [[[2.0, 3.0], [2.0, 3.0]]]
    """
    if fused:
        mask = next(iter(masks), None)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, 0.0, "causal" in kinds, scale=scale, enable_gqa=grouped
        )
    scores = query @ key * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    for kind, mask, fill in zip(kinds, masks, fills, strict=True):
        if kind == "add":
            scores = scores + mask
        elif kind == "keep":
            scores = torch.where(mask, scores, torch.full((), fill, dtype=scores.dtype))
        else:
            scores = torch.where(mask, torch.full((), fill, dtype=scores.dtype), scores)
    columns = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks], -1)
    if dtype is not None:
        scores = scores.to(dtype)
    if normaliser == "softmax":
        weights = scores.softmax(-1)
    else:
        weights = torch.sigmoid(scores) if normaliser == "sigmoid" else torch.relu(scores)
    if sinks is not None:
        weights = weights[..., :columns]
    return weights.to(value.dtype) @ value


def emit(site: AttentionSite) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The operation a site stands for, or None where its steps have no canonical order (the site's notes say why)."""
    if any(note.startswith("not raised") for note in site.notes):
        return None
    masks = tuple(mask for _, mask, _ in site.masks if isinstance(mask, fx.Node))
    options = {
        "kinds": tuple(kind for kind, _, _ in site.masks),
        "fills": tuple(0.0 if fill is None else float(fill) for _, _, fill in site.masks),
        "scale": site.scale,
        "softcap": site.softcap,
        "normaliser": site.normaliser,
        "dtype": site.score_dtype,
        "fused": site.pattern == "attention",
        "grouped": site.grouped,
    }
    return attention, (site.query, site.key, site.value, masks, site.sinks), options
