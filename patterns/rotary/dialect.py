"""The rotary embedding as an operation of the dialect: plain functions whose bodies are their meaning."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary", "rotary_complex"]


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "half",
    start: int = 0,
    rotated: int | None = None,
    inverse: bool = False,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate pairs of features: ``(a, b) -> (a cos - b sin, b cos + a sin)``; other features pass.

    Parameters
    ----------
    x
        (..., features).
    cos, sin
        What the pairs are multiplied by, broadcast to them: one value a feature, or one a pair.
    layout
        Which features are pairs: ``half`` (i and i + n/2), ``interleaved`` (2i and 2i + 1), or ``unwoven``: neighbours are
        paired, and the result holds all first elements, then all second ones.
    start, rotated
        Which features are rotated; all by default.
    inverse
        Turn the other way.
    compute, dtype
        Of the rotation and of the result.
    """
    end = x.shape[-1] if rotated is None else start + rotated
    h = x[..., start:end]
    h = h if compute is None else h.to(compute)
    a, b = h.chunk(2, -1) if layout == "half" else (h[..., ::2], h[..., 1::2])
    if cos.shape[-1] == end - start and layout != "unwoven":
        turned = torch.cat((-b, a), -1) if layout == "half" else torch.stack((-b, a), -1).flatten(-2)
        y = h * cos - turned * sin if inverse else h * cos + turned * sin
    else:
        a, b = (a * cos + b * sin, b * cos - a * sin) if inverse else (a * cos - b * sin, b * cos + a * sin)
        y = torch.stack((a, b), -1).flatten(-2) if layout == "interleaved" else torch.cat((a, b), -1)
    y = y if dtype is None else y.to(dtype)
    return _with_rest(x, y, start, end)


def rotary_complex(
    x: Tensor,
    turn: Tensor,
    *,
    start: int = 0,
    rotated: int | None = None,
    compute: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate neighbouring features, ``(a + ib) turn`` with complex factors ``turn = cos + i sin``; other features pass.

    Parameters
    ----------
    x
        (..., features).
    turn
        Complex, broadcast to (..., rotated / 2).
    start, rotated
        Which features are rotated; all by default.
    compute, dtype
        Of the rotation and of the result.
    """
    end = x.shape[-1] if rotated is None else start + rotated
    h = x[..., start:end]
    h = h if compute is None else h.to(compute)
    pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2))
    y = torch.view_as_real(pairs * turn).flatten(-2)
    y = y if dtype is None else y.to(dtype)
    return _with_rest(x, y, start, end)


def _with_rest(x: Tensor, y: Tensor, start: int, end: int) -> Tensor:
    """Join what passes around what was rotated."""
    return torch.cat((x[..., :start], y, x[..., end:]), -1) if start or end < x.shape[-1] else y
