"""Kernels for integer weights with floating activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from recast.kernels.quantized_matmul import reference
from recast.passes.forms.quantized import Quantized

__all__ = ["contrib", "dequantized", "four_bit", "narrow", "wide"]

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Made = tuple[str, dict[str, Tensor], Run]

# Sizes of a group that MatMulNBits takes.
_BLOCKS = (16, 32, 64, 128, 256)


def contrib(
    name: str,
    inputs: list[Tensor | None],
    shape: list[int | torch.SymInt],
    dtype: torch.dtype = torch.float32,
    **attributes: int | float,
) -> Tensor:
    """Emit one of ONNX Runtime's own operators (domain com.microsoft)."""
    return symbolic(f"com.microsoft::{name}", inputs, dict(attributes), dtype=dtype, shape=shape, version=1)


def four_bit(operator: Quantized, accuracy_level: int) -> Made | None:
    """MatMulNBits: codes stay packed in memory, unpacked a tile at a time inside the product.

    With `accuracy_level` 4 the kernel rounds x to int8 first, which is faster for few tokens and not what the
    operator means; 0 is exact up to the order of additions.
    """
    m, n = operator.shape
    group = n if operator.group is None else operator.group
    if group not in _BLOCKS or n % group:
        return None
    groups = n // group
    held = {"values": operator.values.reshape(m, groups, group // 2), "scale": operator.scale.reshape(m, groups)}
    if operator.zero is not None:
        held["zero"] = reference.pack_int4(operator.zero).reshape(m, -1)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inputs = [wide(x), tensors["values"], tensors["scale"], tensors.get("zero")]
        y = contrib(
            "MatMulNBits",
            [t for t in inputs if t is not None],
            [*x.shape[:-1], m],
            K=n,
            N=m,
            bits=4,
            block_size=group,
            accuracy_level=accuracy_level,
        )
        return narrow(y, x)

    return f"MatMulNBits (4 bits, accuracy level {accuracy_level})", held, run


def dequantized(operator: Quantized) -> Made:
    """DequantizeLinear and MatMul: small in the file, unpacked once when the session is made.

    ONNX Runtime has no product of float activations and 8-bit weights that is exact and not slower than this.
    """
    m, n = operator.shape
    codes = reference.unpack_int4(operator.values, n) if operator.bits == 4 else operator.values
    held = {"values": codes.t().contiguous(), "scale": operator.scale.t().contiguous()}
    zero = operator.zero
    if zero is None and operator.bits == 4:
        zero = torch.full_like(operator.scale, 8, dtype=torch.uint8)
    if zero is not None:
        held["zero"] = zero.t().contiguous()
    groups = reference.group_count(n, operator.group)
    if groups == 1:
        held = {name: t if name == "values" else t.reshape(-1) for name, t in held.items()}
    attributes = {"axis": 1} if groups == 1 else {"axis": 0, "block_size": int(operator.group or n)}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        inputs = [tensors[name] for name in ("values", "scale", "zero") if name in tensors]
        weight = symbolic("DequantizeLinear", inputs, dict(attributes), dtype=torch.float32, shape=[n, m])
        return narrow(wide(x) @ weight, x)

    return f"DequantizeLinear + MatMul ({operator.bits} bits in the file)", held, run


def wide(x: Tensor) -> Tensor:
    """X in float32, as ONNX Runtime's own operators take it."""
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def narrow(y: Tensor, x: Tensor) -> Tensor:
    """Y in the dtype of x."""
    return y if y.dtype == x.dtype else y.to(x.dtype)
