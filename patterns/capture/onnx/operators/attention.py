"""Attention as one operator, and rotary embeddings: onnxruntime's own and those of opset 23."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Left

_CONTRIB = "com.microsoft"


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, tokens, heads * width] -> [batch, heads, tokens, width]."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] -> [batch, tokens, heads * width]."""
    return x.transpose(1, 2).flatten(2)


def _key_mask(mask: Tensor, keys: Any, filtered: float, dtype: torch.dtype) -> Tensor:
    """Onnxruntime's masks as what is added to scores: lengths, or ones for tokens that are seen."""
    if mask.ndim == 1:
        seen = torch.arange(keys) < mask.unsqueeze(-1)
    elif mask.ndim in (2, 3):
        seen = mask != 0
    else:
        raise Left(f"with a mask of {mask.ndim} dimensions")
    added = torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), filtered, dtype=dtype))
    return added[:, None, None] if seen.ndim == 2 else added[:, None]


def _causal(scores_of: tuple[Any, Any], dtype: torch.dtype) -> Tensor:
    rows, columns = torch.arange(scores_of[0]), torch.arange(scores_of[1])
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(columns <= rows.unsqueeze(-1), torch.zeros((), dtype=dtype), lowest)


def _attend(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], causal: bool, scale: float | None) -> Tensor:
    """Attention of heads, with everything that is added to the scores."""
    if causal and not masks:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if causal:
        masks = [*masks, _causal((q.shape[2], k.shape[2]), q.dtype)]
    added = sum(masks[1:], masks[0]) if masks else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _scale(call: Call) -> float | None:
    return call.attribute("scale") or None


@operator("Attention", domain=_CONTRIB)
def packed_attention(call: Call) -> Tensor:
    """Attention with the projections to Q, K and V inside, as one matrix."""
    call.alone()
    call.without(4, 6)  # a cache
    call.refuse(do_rotary=0, past_present_share_buffer=0)
    x, weight, bias, mask, added = call.tensor(0), call.tensor(1), call.maybe(2), call.maybe(3), call.maybe(5)
    sizes = call.attribute("qkv_hidden_sizes") or [int(weight.shape[1]) // 3] * 3
    packed = torch.matmul(x, weight)
    packed = packed if bias is None else packed + bias
    heads = call.attribute("num_heads")
    q, k, v = (_heads(part, heads) for part in torch.split(packed, sizes, -1))
    masks = (
        [] if mask is None else [_key_mask(mask, k.shape[2], call.attribute("mask_filter_value", -10000.0), x.dtype)]
    )
    masks += [] if added is None else [added]
    return _joined(_attend(q, k, v, masks, bool(call.attribute("unidirectional", 0)), _scale(call)))


@operator("MultiHeadAttention", domain=_CONTRIB)
def multi_head_attention(call: Call) -> Tensor:
    """Attention of Q, K and V that are projected already."""
    call.alone()
    call.without(6, 7, 8, 9)  # a cache
    heads = call.attribute("num_heads")
    query, key, value = call.tensor(0), call.maybe(1), call.maybe(2)
    bias, mask, added = call.maybe(3), call.maybe(4), call.maybe(5)
    if query.ndim != 3 or key is None or value is None:
        raise Left("with Q, K and V packed")
    if bias is not None:
        parts = [query.shape[-1], *([t.shape[-1] for t in (key, value)] if key.ndim == 3 else [])]
        if len(parts) == 1:
            raise Left("with a bias and keys that are heads already")
        biases = torch.split(bias, [int(n) for n in parts])
        query, key, value = (t + b for t, b in zip((query, key, value), biases, strict=True))
    q = _heads(query, heads)
    k, v = (t if t.ndim == 4 else _heads(t, heads) for t in (key, value))
    masks = (
        [] if mask is None else [_key_mask(mask, k.shape[2], call.attribute("mask_filter_value", -10000.0), q.dtype)]
    )
    masks += [] if added is None else [added]
    return _joined(_attend(q, k, v, masks, bool(call.attribute("unidirectional", 0)), _scale(call)))


@operator("Attention")
def attention(call: Call) -> Tensor:
    """Attention of opset 23."""
    call.alone()
    call.without(4, 5, 6)  # a cache
    call.refuse(softcap=0.0, qk_matmul_output_mode=0, softmax_precision=None)
    q, k, v, mask = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    flat = q.ndim == 3
    if flat:
        q = _heads(q, call.attribute("q_num_heads"))
        k, v = (_heads(t, call.attribute("kv_num_heads")) for t in (k, v))
    causal, shared = bool(call.attribute("is_causal", 0)), q.shape[1] != k.shape[1]
    if mask is not None and causal:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.full((), -torch.inf, dtype=q.dtype))
        mask, causal = mask + _causal((q.shape[2], k.shape[2]), q.dtype), False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=_scale(call), enable_gqa=shared)
    return _joined(y) if flat else y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, width: int) -> Tensor:
    """Rotate the first `width` features of [batch, heads, tokens, features]; cos and sin are [batch, tokens, width / 2]."""
    turned, rest = (x, None) if width in (0, x.shape[-1]) else torch.split(x, [width, int(x.shape[-1]) - width], -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        a, b = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-b, a], -1) * sin
    return turned if rest is None else torch.cat([turned, rest], -1)


@operator("RotaryEmbedding", domain=_CONTRIB)
def rotary_embedding(call: Call) -> Tensor:
    """Of [batch, tokens, heads * width] or heads, by positions and tables."""
    x, positions, cos, sin = (call.tensor(i) for i in range(4))
    call.refuse(is_packed_batching=0)
    width, heads = call.attribute("rotary_embedding_dim", 0), call.attribute("num_heads", 0)
    scaling = call.attribute("scale", 1.0)
    if scaling != 1.0 or positions.ndim != 2:
        raise Left("with a scale, or positions counted from an offset")
    cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    flat = x.ndim == 3
    if flat:
        x = _heads(x, heads or int(x.shape[-1]) // (2 * int(cos.shape[-1])))
    y = _rotated(x, cos, sin, bool(call.attribute("interleaved", 0)), width)
    return _joined(y) if flat else y


@operator("RotaryEmbedding")
def standard_rotary_embedding(call: Call) -> Tensor:
    """Of opset 23: tables first, positions last and optional."""
    x, cos, sin, positions = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    flat = x.ndim == 3
    x = _heads(x, call.attribute("num_heads")) if flat else x
    width = call.attribute("rotary_embedding_dim", 0)
    y = _rotated(x, cos, sin, bool(call.attribute("interleaved", 0)), width)
    return _joined(y) if flat else y
