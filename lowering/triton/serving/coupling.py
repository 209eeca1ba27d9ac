"""Coupled groups of features, alone and between two block-diagonal factors (BLAST): `recast::coupling_matmul`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul.block_op import block_matmul
from recast.kernels.block_diagonal_matmul.reference import PADDING
from recast.kernels.coupling_matmul.coupling_op import coupling_matmul
from recast.kernels.coupling_matmul.launch import DTYPES
from recast.lowering.packed import Packed, plain
from recast.lowering.triton.serving.blocks import BLOCKS
from recast.passes.forms.algebra import Product
from recast.passes.forms.blast import Coupling
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.operator import Operator

__all__ = ["BLAST", "COUPLING", "serve"]

COUPLING = "triton coupling matmul"
BLAST = f"{BLOCKS} + {COUPLING}"


def serve(operator: Operator) -> Packed | None:
    """Hold a coupling, or fill up the groups between two block-diagonal factors; None for anything else."""
    if not isinstance(operator, Coupling):
        return _blast(operator)
    if operator.dtype not in DTYPES:
        return plain(operator, f"aten (coupling in {str(operator.dtype).removeprefix('torch.')}: no kernel)")

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = coupling_matmul(x, tensors["weights"])
        return y

    return Packed(operator, COUPLING, {"weights": operator.weights.contiguous()}, run)


def _blast(operator: Operator) -> Packed | None:
    """Blocks, a coupling and blocks, with groups filled up with zeros to where every one begins at 16 bytes."""
    if not isinstance(operator, Product):
        return None
    if isinstance(operator.left, Product):  # the brackets may stand either way
        left, coupling, right = operator.left.left, operator.left.right, operator.right
    elif isinstance(operator.right, Product):
        left, coupling, right = operator.left, operator.right.left, operator.right.right
    else:
        return None
    if not (isinstance(left, BlockDiagonal) and isinstance(coupling, Coupling) and isinstance(right, BlockDiagonal)):
        return None
    to, of, rank = coupling.weights.shape
    # Groups of the coupling are those of the blocks on both sides.
    if operator.dtype not in DTYPES or left.blocks.shape[0] != to or right.blocks.shape[0] != of:
        return None
    more, missing = -rank % PADDING, -right.blocks.shape[2] % PADDING
    pad = torch.nn.functional.pad
    held = {
        "left": pad(left.blocks, (0, more)).contiguous(),
        "weights": pad(coupling.weights, (0, more)).contiguous(),
        "right": pad(right.blocks, (0, missing, 0, more)).contiguous(),
    }

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        z: Tensor = block_matmul(x, tensors["right"].to(x.dtype), None, None, None, [], [])
        u: Tensor = coupling_matmul(z, tensors["weights"])
        y: Tensor = block_matmul(u, tensors["left"].to(x.dtype), None, None, None, [], [])
        return y

    return Packed(operator, BLAST, held, run)
