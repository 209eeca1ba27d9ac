"""A 2:4 core in 16-bit floats between two block-diagonal matrices: `recast::armor_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recast.kernels.armor_matmul.armor_op import armor_matmul
from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.reference import unpack_bits
from recast.lowering.packed import Packed
from recast.lowering.triton.few import ALWAYS, measured_few
from recast.passes.forms.algebra import DirectSum, Product
from recast.passes.forms.armor import Armor
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.operator import Dense, Operator

__all__ = ["ARMOR", "serve"]

ARMOR = "triton ARMOR matmul"


def serve(operator: Operator) -> Packed | None:
    """Lay out the core and both sides' blocks; None for anything else: parts of another core are served for themselves."""
    if not isinstance(operator, Armor) or not isinstance(operator.right, Product):
        return None
    core, dtype = operator.right.left, operator.dtype
    if not isinstance(core, NMSparse) or not isinstance(core.values, Dense) or (core.keep, core.of) != (2, 4):
        return None
    left, right = _stacked(operator.left), _stacked(operator.right.right)
    if left is None or right is None or core.features % 4 or dtype not in (torch.bfloat16, torch.float16):
        return None
    words, marks = to_lanes(core.values.to_dense().to(dtype), unpack_bits(core.indices, 2, core.values.shape[1]))
    held = {"values": words, "places": marks, "left": left, "right": right}

    def multiply(tensors: Mapping[str, Tensor], x: Tensor, few: int) -> Tensor:
        y: Tensor = armor_matmul(x.to(dtype), *(tensors[name] for name in held), None, few)
        return y.to(x.dtype)

    about: tuple[Any, ...] = core.features, dtype, words.device, "armor", *left.shape, *right.shape
    few = measured_few(functools.partial(multiply, held), *about)
    return Packed(operator, ARMOR, held, functools.partial(multiply, few=ALWAYS if few is None else few))


def _stacked(operator: Operator) -> Tensor | None:
    """Square blocks on a diagonal as (b, d, d), a smaller one at the end filled up with zeros; None for anything else."""
    parts = operator.parts if isinstance(operator, DirectSum) else (operator,)
    stacks = [part.blocks for part in parts if isinstance(part, BlockDiagonal)]
    if len(stacks) != len(parts) or any(stack.shape[1] != stack.shape[2] for stack in stacks):
        return None
    side = stacks[0].shape[1]
    if any(stack.shape[1] > side or len(stack) > 1 for stack in stacks[1:]) or len(stacks) > 2:
        return None
    filled = [torch.nn.functional.pad(s, (0, side - s.shape[2], 0, side - s.shape[1])) for s in stacks]
    return torch.cat(filled).contiguous()
