"""Which kernel runs which operator under Inductor.

On a CPU the int8 product goes to oneDNN (`recast::int8_matmul`), with rounding and scaling around it left to Inductor, which
fuses them with their neighbours. Everything else is plain ATen: with freezing, Inductor folds the dequantization of weights
into constants laid out for oneDNN, so weight-only forms run at the speed of dense ones and save bytes on disk only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.ops import int8_matmul, largest_exact_code
from recast.kernels.quantized_matmul.reference import quantize_tokens
from recast.lowering.inline import Emit
from recast.passes.forms.algebra import Product, RowStack, Sum
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["choose"]


def choose(operator: Operator) -> tuple[str, Operator, Emit]:
    """Kernel of an operator: its name for the report, the operator as the kernel wants it, and what runs it."""
    integer: dict[str, bool] = {}
    _plan(operator, "", integer)
    names = {
        "onednn int8" if ok else "aten, rounded in float: this CPU's int8 product would saturate"
        for ok in integer.values()
    }

    def emit(held: Operator, x: Tensor) -> Tensor:
        return _run(held, x, "", integer)

    return " + ".join(sorted(names)) or "aten", operator, emit


def _plan(operator: Operator, path: str, integer: dict[str, bool]) -> None:
    """Decide for each leaf that rounds its input whether the integer product is exact here."""
    if isinstance(operator, Quantized) and operator.activations:
        plain = operator.symmetric and operator.scale.shape[1] == 1
        integer[path] = plain and int(operator.values.to(torch.int32).abs().max()) <= largest_exact_code()
    for name, child in operator.children().items():
        _plan(child, f"{path}.{name}", integer)


def _run(operator: Operator, x: Tensor, path: str, integer: dict[str, bool]) -> Tensor:
    if integer.get(path):
        assert isinstance(operator, Quantized)
        return _int8(operator, x)
    children = operator.children()
    if isinstance(operator, Product):
        return _run(operator.left, _run(operator.right, x, f"{path}.right", integer), f"{path}.left", integer)
    if isinstance(operator, Sum | RowStack) and children:
        results = [_run(child, x, f"{path}.{name}", integer) for name, child in children.items()]
        if isinstance(operator, RowStack):
            return torch.cat(results, -1)
        total = results[0]
        for result in results[1:]:
            total = total + result
        return total
    return operator.apply(x)


def _int8(operator: Quantized, x: Tensor) -> Tensor:
    """``y = (sum q w - z sum w) * s_x * s_w`` with q, z, s_x of each token."""
    codes, scale, zero = quantize_tokens(x, per_token=operator.per_token)
    weight, weight_scale = operator.values, operator.scale[:, 0].float()
    sums: Tensor = int8_matmul(codes.reshape(-1, x.shape[-1]), weight, weight_scale)
    sums = sums.reshape(*x.shape[:-1], weight.shape[0])
    offset = weight.sum(1).float() * weight_scale
    return ((sums - zero * offset) * scale).to(x.dtype)
