"""Kernels for 8-bit weights with activations rounded to 8 bits as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out

from recast.lowering.onnx.weights import contrib, narrow, wide
from recast.passes.forms.quantized import Quantized

__all__ = ["input_grid", "pairs_fit", "quantize", "rounding_product"]

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Made = tuple[str, dict[str, Tensor], Run]

# A row of zeros has no range; the smallest normal number stands for its scale, and zero divided by it is zero.
_TINY = 1.1754944e-38
# Largest |code| in the rows that take the activations' zero point into the product: two of them fit a pair.
_DIGIT = 64


def pairs_fit(values: Tensor) -> bool:
    """Whether x86 without VNNI multiplies these codes (m, n) with bytes exactly.

    It adds the products of two neighbouring inputs, unsigned byte times signed byte, in 16 bits with saturation:
    ``255 * (a + b)`` must stay within -32768..32767, which holds for sums of equal sign up to 128.
    """
    codes = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).to(torch.int16)
    pairs = codes.reshape(codes.shape[0], -1, 2)
    over, under = pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1)
    return bool((over <= 128).all() and (under >= -128).all())


def rounding_product(operator: Quantized) -> Made | None:
    """MatMulIntegerToFloat after one QuantizeLinear of x, which all products of the same x share.

    Weights are signed bytes where `pairs_fit`; else they are moved by 128 to unsigned ones, whose kernel is slower and
    exact on every machine.
    """
    if operator.group is not None and operator.group < operator.shape[1]:
        return None
    if operator.static:
        return _static(operator)
    return _per_token(operator) if operator.per_token else _per_tensor(operator)


def _weights(operator: Quantized, codes: Tensor) -> dict[str, Tensor]:
    """Codes (m, k) as MatMulIntegerToFloat takes them, with scales and zero points."""
    signed = pairs_fit(codes)
    moved = codes if signed else (codes.to(torch.int16) + 128).to(torch.uint8)
    held = {"values": moved.t().contiguous(), "scale": operator.scale.reshape(-1)}
    if operator.zero is not None or not signed:
        zero = torch.zeros(len(codes)) if operator.zero is None else operator.zero.reshape(-1)
        held["zero"] = (zero.to(torch.int16) + (0 if signed else 128)).to(moved.dtype)
    return held


def _per_tensor(operator: Quantized) -> Made:
    m = operator.shape[0]
    held = _weights(operator, operator.values)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        codes, scale, zero = symbolic_multi_out(
            "DynamicQuantizeLinear",
            (wide(x),),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, [], []),
        )
        inputs = [codes, tensors["values"], scale, tensors["scale"], zero, tensors.get("zero")]
        return narrow(contrib("MatMulIntegerToFloat", _trim(inputs), [*x.shape[:-1], m]), x)

    return _name("DynamicQuantizeLinear", held), held, run


def _static(operator: Quantized) -> Made:
    m = operator.shape[0]
    held = {**_weights(operator, operator.values), **input_grid(operator)}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        codes, scale, zero = quantize(tensors, wide(x)), tensors["input_scale"], tensors["input_zero"]
        inputs = [codes, tensors["values"], scale, tensors["scale"], zero, tensors.get("zero")]
        return narrow(contrib("MatMulIntegerToFloat", _trim(inputs), [*x.shape[:-1], m]), x)

    return _name("QuantizeLinear", held), held, run


def input_grid(operator: Quantized, signed: bool = False) -> dict[str, Tensor]:
    """Scale and zero point of an operator's inputs: for unsigned codes, as x86 multiplies them and OpenVINO wants them.

    With `signed` a zero point of 0 keeps signed codes, the only ones that TensorRT knows.
    """
    assert operator.input_scale is not None
    assert operator.input_zero is not None
    scale, zero = operator.input_scale.float().reshape(()), operator.input_zero.reshape(())
    if not signed or int(zero) != 0:
        zero = (zero.to(torch.int16) + 128).to(torch.uint8)
    return {"input_scale": scale, "input_zero": zero}


def quantize(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Emit QuantizeLinear of x (..., n) on a grid of `input_grid`."""
    zero = tensors["input_zero"]
    return symbolic("QuantizeLinear", (x, tensors["input_scale"], zero), {}, dtype=zero.dtype, shape=x.shape)


def _per_token(operator: Quantized) -> Made:
    m, n = operator.shape
    held = _weights(operator, operator.values)
    sums = operator.values.sum(-1, dtype=torch.int32)
    if operator.zero is not None:
        sums = sums - n * operator.zero.reshape(-1).to(torch.int32)
    held["sums"] = sums.to(torch.float32) * operator.scale.reshape(-1)
    held["one"] = torch.ones(())

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        codes, scale, zero = quantize_tokens(wide(x).reshape(-1, n))
        inputs = [codes, tensors["values"], tensors["one"], tensors["scale"], None, tensors.get("zero")]
        y = contrib("MatMulIntegerToFloat", _trim(inputs), [codes.shape[0], m])
        y = (y - zero * tensors["sums"]) * scale
        return narrow(y.reshape(*x.shape[:-1], m), x)

    return _name("QuantizeLinear by token", held), held, run


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of (tokens, n) to bytes: codes, and scale and zero (tokens, 1) in float32."""
    top, bottom = x.amax(-1, keepdim=True).clamp_min(0.0), x.amin(-1, keepdim=True).clamp_max(0.0)
    scale = ((top - bottom) / 255).clamp_min(_TINY)
    zero = torch.round(-bottom / scale).clamp(0.0, 255.0)
    inputs = (x, scale.reshape(-1), zero.reshape(-1).to(torch.uint8))
    codes = symbolic("QuantizeLinear", inputs, {"axis": 0}, dtype=torch.uint8, shape=x.shape)
    return codes, scale, zero


def _trim(inputs: list[Tensor | None]) -> list[Tensor | None]:
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs


def _name(rounding: str, held: Mapping[str, Tensor]) -> str:
    sign = "s8" if held["values"].dtype == torch.int8 else "u8"
    return f"{rounding} + MatMulIntegerToFloat (u8 x {sign})"
