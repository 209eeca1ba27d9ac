"""Activations and softmax, those of onnxruntime among them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.patterns.capture.onnx.operator import Call, operator

_CONTRIB = "com.microsoft"


@operator("Relu")
def relu(call: Call) -> Tensor:
    """max(x, 0)."""
    return torch.relu(call.tensor(0))


@operator("LeakyRelu")
def leaky_relu(call: Call) -> Tensor:
    """x, or alpha x below zero."""
    return F.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


@operator("PRelu")
def prelu(call: Call) -> Tensor:
    """x, or slope x below zero, with a slope for each channel."""
    x, slope = call.tensor(0), call.tensor(1)
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(call: Call) -> Tensor:
    """x, or alpha (exp(x) − 1) below zero."""
    return F.elu(call.tensor(0), call.attribute("alpha", 1.0))


@operator("Selu")
def selu(call: Call) -> Tensor:
    """Elu with factors that keep the variance."""
    x = call.tensor(0)
    alpha: float = call.attribute("alpha", 1.67326319217681884765625)
    gamma: float = call.attribute("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operator("Softplus")
def softplus(call: Call) -> Tensor:
    """log(1 + exp(x))."""
    return F.softplus(call.tensor(0))


@operator("Softsign")
def softsign(call: Call) -> Tensor:
    """X / (1 + |x|)."""
    return F.softsign(call.tensor(0))


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Tensor:
    """Alpha x + beta, between 0 and 1."""
    return torch.clamp(call.tensor(0) * call.attribute("alpha", 0.2) + call.attribute("beta", 0.5), 0.0, 1.0)


@operator("HardSwish")
def hard_swish(call: Call) -> Tensor:
    """X clamp(x / 6 + 1/2, 0, 1)."""
    return F.hardswish(call.tensor(0))


@operator("Mish")
def mish(call: Call) -> Tensor:
    """X tanh(softplus(x))."""
    return F.mish(call.tensor(0))


@operator("Swish")
def swish(call: Call) -> Tensor:
    """X sigmoid(alpha x)."""
    x, alpha = call.tensor(0), call.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("QuickGelu", domain=_CONTRIB)
def quick_gelu(call: Call) -> Tensor:
    """X sigmoid(alpha x) with alpha 1.702 by default."""
    x = call.tensor(0)
    return x * torch.sigmoid(call.attribute("alpha", 1.702) * x)


@operator("Gelu")
def gelu(call: Call) -> Tensor:
    """Exact, or approximated by tanh."""
    return F.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


@operator("Gelu", "BiasGelu", domain=_CONTRIB)
def gelu_with_bias(call: Call) -> Tensor:
    """Exact GELU, of x and a bias if there is one."""
    x, bias = call.tensor(0), call.maybe(1)
    return F.gelu(x if bias is None else x + bias)


@operator("FastGelu", domain=_CONTRIB)
def fast_gelu(call: Call) -> Tensor:
    """GELU by tanh, of x and a bias if there is one."""
    x, bias = call.tensor(0), call.maybe(1)
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("Softmax", "LogSoftmax")
def softmax(call: Call) -> Tensor:
    """Along an axis; up to opset 12 along that and all that follow it."""
    run = torch.softmax if call.node.type == "Softmax" else torch.log_softmax
    x = call.tensor(0)
    axis = call.attribute("axis", -1 if call.version >= 13 else 1)
    axis += x.ndim if axis < 0 else 0
    if call.version >= 13 or axis == x.ndim - 1:
        return run(x, axis if axis != x.ndim - 1 else -1)
    return run(x.flatten(axis), -1).reshape(x.shape)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call) -> Tensor:
    """X where it exceeds alpha, else 0."""
    x = call.tensor(0)
    return torch.where(x > call.attribute("alpha", 1.0), x, 0.0)


@operator("Celu")
def celu(call: Call) -> Tensor:
    """Elu that is smooth for every alpha."""
    return F.celu(call.tensor(0), call.attribute("alpha", 1.0))


@operator("LpNormalization")
def lp_normalization(call: Call) -> Tensor:
    """X over its p-norm along an axis."""
    x, p = call.tensor(0), call.attribute("p", 2)
    norm: Tensor = torch.linalg.vector_norm(x, ord=float(p), dim=call.attribute("axis", -1), keepdim=True)
    return x / norm
