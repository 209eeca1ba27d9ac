"""Operators laid out as a target's kernels take them, and the one walk over operator trees that all targets share."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.floats import rounded_product
from recast.lowering.inline import Choose, Emit
from recast.passes.forms.algebra import Product, RowStack, Sum
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.gated import Gated
from recast.passes.forms.operator import Cost, Operator
from recast.passes.forms.rounded_inputs import RoundedInputs

__all__ = ["Leaf", "Packed", "Run", "chooser", "pack", "plain"]

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


# Operators that are laid out part by part.
_Tree = Product | Sum | RowStack | ColumnSparse | Gated | RoundedInputs
# How a target packs an operator that is no tree, None where it has no kernel for it.
Leaf = Callable[[Operator], "Packed | None"]


def chooser(leaf: Leaf, fallback: str) -> Choose:
    """Choice of kernels for `recast.lowering.inline.inline_operators`.

    Parameters
    ----------
    leaf
        Asked first, for every operator of a tree from the top.
    fallback
        Name of what runs an operator's own torch code on this target.
    """

    def choose(operator: Operator) -> tuple[str, Operator, Emit]:
        packed = pack(operator, leaf, fallback)
        return packed.kernel, packed, _apply

    return choose


def _apply(operator: Operator, x: Tensor) -> Tensor:
    return operator.apply(x)


def pack(operator: Operator, leaf: Leaf, fallback: str) -> Packed:
    """Lay an operator out; products, sums, stacks of rows, choices of columns, gates and rounding part by part."""
    found = leaf(operator)
    if found is not None:
        return found
    if isinstance(operator, _Tree) and operator.children():
        return _tree(operator, leaf, fallback)
    return plain(operator, fallback)


def plain(operator: Operator, kernel: str) -> Packed:
    """Its own torch code over its own tensors."""

    def run(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return operator.with_tensors(held).apply(x)

    return Packed(operator, kernel, operator.tensors(), run)


def _tree(operator: _Tree, leaf: Leaf, fallback: str) -> Packed:
    children = {name: pack(child, leaf, fallback) for name, child in operator.children().items()}
    held = {f"{name}.{key}": tensor for name, child in children.items() for key, tensor in child.held.items()}
    held.update(operator.own_tensors())

    def part(name: str, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        child = children[name]
        return child.run({key: tensors[f"{name}.{key}"] for key in child.held}, x)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if isinstance(operator, Product):
            return part("left", tensors, part("right", tensors, x))
        if isinstance(operator, ColumnSparse):
            return part("values", tensors, torch.index_select(x, -1, tensors["columns"]))
        if isinstance(operator, Gated):
            gate = Gated(operator.weight, tensors.get("norms"), operator.kept, operator.threshold)
            return part("weight", tensors, gate.gate(x))
        if isinstance(operator, RoundedInputs):
            return rounded_product(x, operator.grid, lambda values: part("weight", tensors, values))
        parts = [part(name, tensors, x) for name in children]
        if isinstance(operator, RowStack):
            return torch.cat(parts, -1)
        total = parts[0]
        for term in parts[1:]:
            total = total + term
        return total

    names = dict.fromkeys(name for child in children.values() for name in child.kernel.split(" + "))
    return Packed(operator, " + ".join(names), held, run)
