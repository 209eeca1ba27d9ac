"""The style that other runtimes read: QuantizeLinear and DequantizeLinear around standard products, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from recast.lowering.onnx.integer import input_grid, pairs_fit, quantize
from recast.lowering.onnx.weights import dequantized, narrow, wide
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.module import OperatorModule
from recast.patterns.errors import TargetError
from recast.patterns.program import Program, get_by_path

__all__ = ["all_pairs_fit", "check_static", "quantized_product", "share_roundings"]

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Made = tuple[str, dict[str, Tensor], Run]

_SYMBOLIC = torch.ops.onnx_symbolic._symbolic.default
_ROUNDS = ("QuantizeLinear", "DequantizeLinear")


def quantized_product(operator: Quantized) -> Made | None:
    """QuantizeLinear and DequantizeLinear of x, DequantizeLinear of the weight, MatMul: a product of integers to who knows it.

    None for scales by group: ONNX Runtime 1.31 takes blocks of scales for rows of them, and fails.
    """
    if operator.scale.shape[1] != 1:
        return None
    _, weight, product = dequantized(operator)
    held = {**weight, **input_grid(operator, signed=True)}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        given = wide(x)
        inputs = (quantize(tensors, given), tensors["input_scale"], tensors["input_zero"])
        rounded = symbolic("DequantizeLinear", inputs, {}, dtype=torch.float32, shape=given.shape)
        return narrow(product(tensors, rounded), x)

    sign = "s8" if held["input_zero"].dtype == torch.int8 else "u8"
    return f"QuantizeLinear + DequantizeLinear + MatMul ({sign} x s8)", held, run


def check_static(program: Program) -> None:
    """Raise TargetError where inputs are rounded over a range that is found as they come, which the style has no words for."""
    found: list[str] = []
    for node in program.graph.find_nodes(op="call_module"):
        module = program.module.get_submodule(str(node.target))
        if isinstance(module, OperatorModule) and _dynamic(module.operator):
            found.append(f"'{module.site}' ({module.form})")
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise TargetError(
            f"target 'onnx': style='qdq' needs scales of the inputs before they come; {found[0]}{more} would find them as they "
            "come. int8(activations=true, static=true) takes them from the calibration, style='qoperator' keeps what there is"
        )


def all_pairs_fit(program: Program) -> bool | None:
    """Whether any CPU multiplies the integers of a program exactly, see `pairs_fit`; None where none are multiplied.

    Where they do not fit, x86 without VNNI has to multiply them as floats: ONNX Runtime's own way around it
    (``session.x64quantprecision``) fails on weights without zero points (1.31).
    """
    modules = [program.module.get_submodule(str(node.target)) for node in program.graph.find_nodes(op="call_module")]
    held = [o for module in modules if isinstance(module, OperatorModule) for o in _static(module.operator)]
    return all(pairs_fit(operator.values) for operator in held) if held else None


def _static(operator: Operator) -> list[Quantized]:
    if isinstance(operator, Quantized):
        return [operator] if operator.static else []
    return [found for child in operator.children().values() for found in _static(child)]


def _dynamic(operator: Operator) -> bool:
    if isinstance(operator, Quantized):
        return operator.activations and not operator.static
    return any(_dynamic(child) for child in operator.children().values())


def share_roundings(program: Program) -> None:
    """Keep one QuantizeLinear, and one DequantizeLinear, of all that round the same value on the same grid."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.target is not _SYMBOLIC or node.args[1] not in _ROUNDS:
            continue
        operands = tuple(_value(program, operand) for operand in node.args[0])
        other = first.setdefault((operands, *(str(argument) for argument in node.args[1:])), node)
        if other is not node:
            node.replace_all_uses_with(other)
            program.graph.erase_node(node)


def _value(program: Program, node: Any) -> Any:
    """A node, or what a scale or zero point holds."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return node
    held = get_by_path(program.module, str(node.target))
    return (held.dtype, held.item()) if isinstance(held, Tensor) and held.dim() == 0 else str(node.target)
