"""Which ONNX operators run which operator tree, chosen by measurement (`docs/onnx-kernels.md`)."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast.lowering.inline import Choose, Emit
from recast.lowering.onnx.integer import rounding_product
from recast.lowering.onnx.weights import dequantized, four_bit
from recast.passes.forms.algebra import Product, RowStack, Sum
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.operator import Cost, Dense, Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["Packed", "chooser"]

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Packed(Operator):
    """An operator with its tensors laid out as a kernel takes them.

    Attributes
    ----------
    source
        What it stands for.
    kernel
        Its name, for the report.
    held
        Tensors of the kernel, by name.
    run
        Emits the kernel, given the tensors and x.
    """

    source: Operator
    kernel: str
    held: dict[str, Tensor]
    run: Run

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def apply(self, x: Tensor) -> Tensor:
        return self.run(self.held, x)

    def to_dense(self) -> Tensor:
        return self.source.to_dense()

    def cost(self, tokens: int) -> Cost:
        return self.source.cost(tokens)

    def to(self, dtype: torch.dtype) -> Operator:
        return self.source.to(dtype)

    def own_tensors(self) -> dict[str, Tensor]:
        return self.held

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Packed:
        return Packed(self.source, self.kernel, {name: tensors[name] for name in self.held}, self.run)

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        raise TypeError("a packed operator is made from the operator it stands for")


def chooser(accuracy_level: int = 0) -> Choose:
    """Choice of kernels for `recast.lowering.inline.inline_operators`."""

    def choose(operator: Operator) -> tuple[str, Operator, Emit]:
        packed = pack(operator, accuracy_level)
        return packed.kernel, packed, _apply

    return choose


def _apply(operator: Operator, x: Tensor) -> Tensor:
    return operator.apply(x)


def pack(operator: Operator, accuracy_level: int) -> Packed:
    """Lay an operator tree out for ONNX Runtime; what no kernel serves runs as the operator's own torch code."""
    if operator.dtype == torch.float32:
        if isinstance(operator, Dense):
            # Stored (in, out), as MatMul wants it: no Transpose in the file.
            return Packed(operator, "MatMul", {"weight": operator.weight.t().contiguous()}, _matmul)
        if isinstance(operator, Quantized):
            found = _quantized(operator, accuracy_level)
            if found is not None:
                return found
        if isinstance(operator, BlockDiagonal):
            return Packed(operator, "batched MatMul", {"blocks": operator.blocks.transpose(1, 2).contiguous()}, _blocks)
        if isinstance(operator, Product | Sum | RowStack):
            return _tree(operator, accuracy_level)
    plain = operator

    def run(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return plain.with_tensors(held).apply(x)

    return Packed(operator, "standard operators", operator.tensors(), run)


def _matmul(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x @ held["weight"]


def _blocks(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    blocks = held["blocks"]  # (b, q, p)
    b, q, p = blocks.shape
    y = torch.matmul(x.reshape(-1, b, q).transpose(0, 1), blocks).transpose(0, 1)
    return y.reshape(*x.shape[:-1], b * p)


def _quantized(operator: Quantized, accuracy_level: int) -> Packed | None:
    if operator.scale.dtype != torch.float32:
        return None
    if operator.activations:
        rounding = rounding_product(operator)
        return None if rounding is None else Packed(operator, *rounding)
    if operator.bits == 4:
        made = four_bit(operator, accuracy_level)
        if made is not None:
            return Packed(operator, *made)
    return Packed(operator, *dequantized(operator))


def _tree(operator: Product | Sum | RowStack, accuracy_level: int) -> Packed:
    children = {name: pack(child, accuracy_level) for name, child in operator.children().items()}
    held = {f"{name}.{key}": tensor for name, child in children.items() for key, tensor in child.held.items()}

    def part(name: str, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        child = children[name]
        return child.run({key: tensors[f"{name}.{key}"] for key in child.held}, x)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if isinstance(operator, Product):
            return part("left", tensors, part("right", tensors, x))
        parts = [part(name, tensors, x) for name in children]
        if isinstance(operator, RowStack):
            return torch.cat(parts, -1)
        total = parts[0]
        for term in parts[1:]:
            total = total + term
        return total

    names = dict.fromkeys(child.kernel for child in children.values())
    return Packed(operator, " + ".join(names), held, run)
