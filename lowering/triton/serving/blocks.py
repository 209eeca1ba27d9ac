"""Blocks on a diagonal, in products with shuffles and permutations of features: `recast::block_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul.block_op import block_matmul
from recast.kernels.block_diagonal_matmul.launch import DTYPES
from recast.kernels.block_diagonal_matmul.reference import PADDING
from recast.lowering.packed import Packed, plain
from recast.lowering.triton.few import ALWAYS, measured_few
from recast.passes.forms.algebra import DirectSum, Product
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.operator import Operator
from recast.passes.forms.permutation import Permutation, Reordering, Shuffle

__all__ = ["BLOCKS", "serve"]

BLOCKS = "triton block matmul"


@dataclass(frozen=True)
class _Step:
    """Blocks with the reorderings right before and right after them, which are where they load and where they store."""

    blocks: BlockDiagonal
    before: Reordering | None = None
    after: Reordering | None = None


def serve(operator: Operator) -> Packed | None:
    """Lay out blocks, a product of blocks and reorderings alone, or a direct sum of blocks; None for anything else."""
    if isinstance(operator, BlockDiagonal):
        steps = [_Step(operator)]
    elif isinstance(operator, Product):
        found = _steps(list(reversed(_factors(operator))))
        if found is None:
            return None
        steps = found
    elif isinstance(operator, DirectSum) and all(isinstance(part, BlockDiagonal) for part in operator.parts):
        return _side_by_side(operator)
    else:
        return None
    wrong = next((step.blocks.dtype for step in steps if step.blocks.dtype not in DTYPES), None)
    if wrong is not None:
        return plain(operator, f"aten (blocks of {str(wrong).removeprefix('torch.')}: no kernel)")
    held = {f"{i}.{name}": tensor for i, step in enumerate(steps) for name, tensor in _held(step).items()}

    def multiply(tensors: Mapping[str, Tensor], x: Tensor, few: int) -> Tensor:
        for i, step in enumerate(steps):
            x = _run(step, {name: tensors.get(f"{i}.{name}") for name in ("blocks", "gather", "scatter")}, x, few)
        return x

    # One number for the whole product: what a reordering costs depends on who stores what it reorders.
    first = steps[0].blocks
    shapes = [(tuple(s.blocks.blocks.shape), _told(s.before), _told(s.after)) for s in steps]
    about: tuple[Any, ...] = operator.shape[1], first.dtype, first.blocks.device, "blocks", *shapes
    few = measured_few(functools.partial(multiply, held), *about)
    return Packed(operator, BLOCKS, held, functools.partial(multiply, few=ALWAYS if few is None else few))


def _told(order: Reordering | None) -> str:
    return f"{order.rows}x{order.columns}x{order.width}" if isinstance(order, Shuffle) else type(order).__name__


def _factors(operator: Operator) -> list[Operator]:
    """Factors of a product, the last to be applied first."""
    if isinstance(operator, Product):
        return _factors(operator.left) + _factors(operator.right)
    return [operator]


def _steps(factors: list[Operator]) -> list[_Step] | None:
    """Blocks with what stands before and after each, in the order of their application.

    A reordering goes where the blocks before it store, since results are stored once and loaded for every tile of outputs.
    None where a factor is something else, or a reordering has no blocks left that it could go with.
    """
    steps: list[_Step] = []
    waiting: Reordering | None = None
    for factor in factors:
        if isinstance(factor, BlockDiagonal):
            steps.append(_Step(factor, waiting))
            waiting = None
        elif not isinstance(factor, Shuffle | Permutation) or waiting is not None:
            return None
        elif steps and steps[-1].after is None:
            steps[-1] = _Step(steps[-1].blocks, steps[-1].before, factor)
        else:
            waiting = factor
    return steps if steps and waiting is None else None


def _held(step: _Step) -> dict[str, Tensor]:
    """Blocks with every row from a multiple of 16 bytes on, and indices of the places where features stand."""
    blocks, missing = step.blocks.blocks.contiguous(), -step.blocks.blocks.shape[2] % PADDING
    held = {"blocks": torch.nn.functional.pad(blocks, (0, missing)) if missing else blocks}
    if isinstance(step.before, Permutation):
        held["gather"] = step.before.order
    if isinstance(step.after, Permutation):
        held["scatter"] = step.after.inverse().order
    return held


def _run(step: _Step, tensors: Mapping[str, Tensor | None], x: Tensor, few: int) -> Tensor:
    blocks = tensors["blocks"]
    assert blocks is not None
    # What a shuffle gives, column by column, is what blocks take and what it takes, row by row, is what they give.
    before = [step.before.columns, step.before.rows, step.before.width] if isinstance(step.before, Shuffle) else []
    after = [step.after.rows, step.after.columns, step.after.width] if isinstance(step.after, Shuffle) else []
    y: Tensor = block_matmul(x, blocks.to(x.dtype), None, tensors["gather"], tensors["scatter"], before, after, few)
    return y


def _side_by_side(operator: DirectSum) -> Packed:
    """Several sizes of blocks, one after another: a product for each size."""
    parts = [part for part in map(serve, operator.parts) if part is not None]
    ends = [sum(part.shape[1] for part in parts[:i]) for i in range(len(parts) + 1)]
    held = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.held.items()}

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        given = [{name: tensors[f"{i}.{name}"] for name in part.held} for i, part in enumerate(parts)]
        return torch.cat([part.run(given[i], x[..., ends[i] : ends[i + 1]]) for i, part in enumerate(parts)], -1)

    return Packed(operator, " + ".join(dict.fromkeys(part.kernel for part in parts)), held, run)
