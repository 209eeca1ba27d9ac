"""Operators on weights or activations that are quantized already: left as they are, so that nothing is rounded twice."""

from __future__ import annotations

from typing import NoReturn

from recast.patterns.capture.onnx.kept import DONE
from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Left

_STANDARD = [
    "DequantizeLinear",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
]
_CONTRIB = [
    "DequantizeLinear",
    "QuantizeLinear",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QAttention",
    "QGemm",
    "QMoE",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConv",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
    "QLinearConcat",
    "QLinearLeakyRelu",
    "QLinearReduceMean",
    "QEmbedLayerNormalization",
    "GatherBlockQuantized",
    "DynamicQuantizeLSTM",
]


def _left(call: Call) -> NoReturn:
    raise Left(DONE)


operator(*_STANDARD)(_left)
operator(*_CONTRIB, domain="com.microsoft")(_left)
