"""`recast::attention_of_heads`: attention on a CPU as one operation of a graph, by the kernel for short keys or by torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.attention import short_keys
from recast.kernels.attention.reference import attention_weights, by_head

__all__ = ["attention"]


@torch.library.custom_op("recast::attention_of_heads", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, least: int, most: int
) -> Tensor:
    """Compute ``softmax(scale q kᵀ + mask) v``.

    Parameters
    ----------
    q, k, v, mask, causal, scale
        As `short_keys.short_keys` takes them.
    least
        Fewest queries for which the kernel for short keys is used; for fewer its keys are not worth laying out.
    most
        Most keys for which it is used.

    Returns
    -------
    (b, h, l, e) in q's dtype, laid out as (b, l, h, e). Gradients reach q, k and v.

    Examples
    --------
    >>> q = torch.randn(1, 4, 5, 8)
    >>> k, v = torch.randn(2, 1, 2, 6, 8).unbind()
    >>> found = attention(q, k, v, None, False, 0.5, 1, 64)
    >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
    >>> torch.testing.assert_close(found, wanted)
    """
    keys = k.shape[2]
    if q.shape[2] >= least and keys <= most and short_keys.fits(keys, k.shape[3], v.shape[3]):
        return short_keys.short_keys(q, k, v, mask, causal, scale)
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    found = found.transpose(1, 2).contiguous().transpose(1, 2)
    return found.clone() if any(found.data_ptr() == given.data_ptr() for given in (q, k, v)) else found


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, least: int, most: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, causal, scale, _, _ = inputs
    ctx.save_for_backward(q, k, v, mask)
    ctx.causal, ctx.scale = causal, scale


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """By the definition, with the weights of all queries written out again."""
    q, k, v, mask = ctx.saved_tensors
    heads, groups = q.shape[1], k.shape[1]
    weights = attention_weights(q, k, mask, ctx.causal, ctx.scale)
    pulled = gradient @ by_head(v, heads).mT
    scores = weights * (pulled - (pulled * weights).sum(-1, keepdim=True)) * ctx.scale

    def shared(t: Tensor) -> Tensor:
        return t if groups == heads else t.reshape(t.shape[0], groups, heads // groups, *t.shape[2:]).sum(2)

    return scores @ by_head(k, heads), shared(scores.mT @ q), shared(weights.mT @ gradient), *[None] * 5


attention.register_autograd(_gradients, setup_context=_keep)
