"""Normalisations as operations of the dialect: plain functions whose bodies are their meaning.

The dtypes say where a model widens and rounds; left out, each is that of the step before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["batch_norm", "group_norm", "l2_norm", "layer_norm", "rms_norm"]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    eps_at: str = "inside",
    axes: int = 1,
    offset: float = 0.0,
    compute: torch.dtype | None = None,
    between: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps) * (offset + weight) + bias`` over the last `axes` dimensions.

    Parameters
    ----------
    x
        (..., features).
    weight, bias
        Of the shape of what is normalised, or anything that broadcasts to `x`.
    eps
        Added to the variance (``inside``) or to its root (``outside``), or the least that the root may be (``floor``).
    axes
        Number of trailing dimensions.
    offset
        Added to the weight.
    compute, between, dtype
        Of the statistics, of the normalised value where it meets the weight, and of the result.
    """
    shape = x.shape[x.ndim - axes :]
    h = x if compute is None else x.to(compute)
    if eps_at != "inside":
        dims = tuple(range(-axes, 0))
        h = h - h.mean(dims, keepdim=True)
        h = h * _inverse((h * h).mean(dims, keepdim=True), eps, eps_at)
        return _affine(h if between is None else h.to(between), weight, bias, offset, dtype)
    if between is None and all(c is None or (c.shape == shape and c.dtype == h.dtype) for c in (weight, bias)):
        h = F.layer_norm(h, shape, weight if weight is None or not offset else offset + weight, bias, eps)
        return h if dtype is None else h.to(dtype)
    h = F.layer_norm(h, shape, None, None, eps)
    h = h if between is None else h.to(between)
    return _affine(h, weight, bias, offset, dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    eps_at: str = "inside",
    groups: int = 1,
    offset: float = 0.0,
    compute: torch.dtype | None = None,
    product: torch.dtype | None = None,
    between: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight) + bias`` over the last dimension, or over each of its groups.

    Parameters
    ----------
    x
        (..., features).
    weight, bias
        (features,), or anything that broadcasts to `x`.
    eps
        Added to the mean square (``inside``) or to its root (``outside``), or the least that the root may be (``floor``).
    groups
        Parts of the last dimension, each normalised for itself.
    offset
        Added to the weight.
    compute, product, between, dtype
        Of the mean square, of its product with `x`, of that where it meets the weight, and of the result.
    """
    shape = x.shape
    if groups > 1:
        x = x.reshape(*shape[:-1], groups, shape[-1] // groups)
    wide = x if compute is None else x.to(compute)
    factor = _inverse((wide * wide).mean(-1, keepdim=True), eps, eps_at)
    h = x.to(product) * factor.to(product) if product is not None else wide * factor
    h = h.flatten(-2) if groups > 1 else h
    h = h if between is None else h.to(between)
    return _affine(h, weight, bias, offset, dtype)


def l2_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    eps_at: str = "inside",
    offset: float = 0.0,
    compute: torch.dtype | None = None,
    product: torch.dtype | None = None,
    between: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x / sqrt(sum(x^2) + eps) * (offset + weight) + bias`` over the last dimension; see `rms_norm`."""
    wide = x if compute is None else x.to(compute)
    factor = _inverse((wide * wide).sum(-1, keepdim=True), eps, eps_at)
    h = x.to(product) * factor.to(product) if product is not None else wide * factor
    h = h if between is None else h.to(between)
    return _affine(h, weight, bias, offset, dtype)


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, groups: int, eps: float) -> Tensor:
    """Layer norm over each of `groups` groups of channels; `x` is (batch, channels, ...)."""
    return F.group_norm(x, groups, weight, bias, eps)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` for each channel; `x` is (batch, channels, ...)."""
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


def _inverse(square: Tensor, eps: float, eps_at: str) -> Tensor:
    if eps_at == "inside":
        return torch.rsqrt(square + eps)
    root = torch.sqrt(square)
    return torch.reciprocal(root + eps if eps_at == "outside" else root.clamp_min(eps))


def _affine(h: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float, dtype: torch.dtype | None) -> Tensor:
    if weight is not None:
        h = h * (offset + weight if offset else weight)
    if bias is not None:
        h = h + bias
    return h if dtype is None else h.to(dtype)
