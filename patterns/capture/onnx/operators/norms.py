"""Normalisations, with what onnxruntime adds on the way into them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Left

_CONTRIB = "com.microsoft"


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, axis: int = -1) -> Tensor:
    shape = [int(n) for n in x.shape[axis:]]
    if all(t is None or list(t.shape) == shape for t in (weight, bias)):
        return F.layer_norm(x, shape, weight, bias, epsilon)
    y = F.layer_norm(x, shape, None, None, epsilon)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, axis: int = -1) -> Tensor:
    shape = [int(n) for n in x.shape[axis:]]
    if list(weight.shape) == shape:
        return F.rms_norm(x, shape, weight, epsilon)
    return F.rms_norm(x, shape, None, epsilon) * weight


@operator("LayerNormalization")
def layer_norm(call: Call) -> Tensor:
    """Over an axis and all that follow it."""
    call.alone()
    x = call.tensor(0)
    axis = call.attribute("axis", -1)
    return _layer_norm(x, call.tensor(1), call.maybe(2), call.attribute("epsilon", 1e-5), axis - x.ndim * (axis >= 0))


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(call: Call) -> Tensor:
    """Over an axis and all that follow it, by the root of the mean square."""
    call.alone()
    x = call.tensor(0)
    axis = call.attribute("axis", -1)
    return _rms_norm(x, call.tensor(1), call.attribute("epsilon", 1e-5), axis - x.ndim * (axis >= 0))


@operator("SkipLayerNormalization", domain=_CONTRIB)
def skip_layer_norm(call: Call) -> list[Tensor | None]:
    """Of a sum of x, what skipped a block, and a bias; gives the sum as well."""
    total = call.tensor(0) + call.tensor(1)
    if (bias := call.maybe(4)) is not None:
        total = call.tensor(0) + bias + call.tensor(1)
    if any(call.wanted[1:3]):
        raise Left("with its mean or its deviation read")
    return [_layer_norm(total, call.tensor(2), call.maybe(3), call.attribute("epsilon", 1e-12)), None, None, total]


@operator("SkipSimplifiedLayerNormalization", domain=_CONTRIB)
def skip_rms_norm(call: Call) -> list[Tensor | None]:
    """The same by the root of the mean square."""
    total = call.tensor(0) + call.tensor(1)
    if (bias := call.maybe(3)) is not None:
        total = call.tensor(0) + bias + call.tensor(1)
    if any(call.wanted[1:3]):
        raise Left("with its mean or its deviation read")
    return [_rms_norm(total, call.tensor(2), call.attribute("epsilon", 1e-12)), None, None, total]


@operator("EmbedLayerNormalization", domain=_CONTRIB)
def embeddings(call: Call) -> list[Tensor | None]:
    """Words, positions and segments looked up, added and normalised; and the number of tokens that a mask lets through."""
    ids, segments, mask, positions = call.tensor(0), call.maybe(1), call.maybe(7), call.maybe(8)
    total = F.embedding(ids, call.tensor(2))
    if segments is not None and call.optional(4) is not None:
        total = total + F.embedding(segments, call.tensor(4))
    if positions is None:
        total = total + call.tensor(3)[: ids.shape[1]]
    else:
        total = total + F.embedding(positions, call.tensor(3))
    y = _layer_norm(total, call.tensor(5), call.tensor(6), call.attribute("epsilon", 1e-12))
    count = torch.zeros_like(ids[:, 0]) if mask is None else mask.sum(1, dtype=torch.int32)
    return [y, count.to(torch.int32), total]


@operator("BatchNormalization")
def batch_norm(call: Call) -> Tensor:
    """By statistics that are kept."""
    call.alone()
    call.refuse(training_mode=0)
    x, weight, bias, mean, variance = (call.tensor(i) for i in range(5))
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, call.attribute("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(call: Call) -> Tensor:
    """Over space, for each channel of each example."""
    x, weight, bias = (call.tensor(i) for i in range(3))
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, call.attribute("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(call: Call) -> Tensor:
    """Over groups of channels and space."""
    if call.version < 21:  # scales were those of groups, a version that nobody took up
        raise Left(f"of opset {call.version}")
    x, weight, bias = (call.tensor(i) for i in range(3))
    return F.group_norm(x, call.attribute("num_groups"), weight, bias, call.attribute("epsilon", 1e-5))
