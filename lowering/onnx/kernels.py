"""Which ONNX operators run which operator tree, chosen by measurement (`docs/onnx-kernels.md`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.lowering.inline import Choose
from recast.lowering.onnx.integer import rounding_product
from recast.lowering.onnx.qdq import quantized_product
from recast.lowering.onnx.weights import dequantized, four_bit
from recast.lowering.packed import Packed, chooser, plain
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.sparse import Sparse

__all__ = ["kernels"]

STANDARD = "standard operators"


def kernels(accuracy_level: int = 0, qdq: bool = False) -> Choose:
    """Choice of kernels for `recast.lowering.inline.inline_operators`; with `qdq`, of standard operators alone."""

    def leaf(operator: Operator) -> Packed | None:
        return _leaf(operator, accuracy_level, qdq)

    return chooser(leaf, STANDARD)


def _leaf(operator: Operator, accuracy_level: int, qdq: bool) -> Packed | None:
    """Lay an operator out for ONNX Runtime; what no kernel serves runs as the operator's own torch code."""
    if isinstance(operator, Sparse) and not isinstance(operator, ColumnSparse):
        # ONNX Runtime has no product with packed sparse weights: zeros are written out, in memory and in the file.
        return Packed(
            operator, "MatMul (sparse, written out)", {"weight": operator.to_dense().t().contiguous()}, _matmul
        )
    if operator.dtype != torch.float32:
        return plain(operator, STANDARD)
    if isinstance(operator, Dense):
        # Stored (in, out), as MatMul wants it: no Transpose in the file.
        return Packed(operator, "MatMul", {"weight": operator.weight.t().contiguous()}, _matmul)
    if isinstance(operator, Quantized):
        return _quantized(operator, accuracy_level, qdq)
    if isinstance(operator, BlockDiagonal):
        return Packed(operator, "batched MatMul", {"blocks": operator.blocks.transpose(1, 2).contiguous()}, _blocks)
    return None


def _matmul(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x @ held["weight"]


def _blocks(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    blocks = held["blocks"]  # (b, q, p)
    b, q, p = blocks.shape
    y = torch.matmul(x.reshape(-1, b, q).transpose(0, 1), blocks).transpose(0, 1)
    return y.reshape(*x.shape[:-1], b * p)


def _quantized(operator: Quantized, accuracy_level: int, qdq: bool) -> Packed | None:
    if operator.scale.dtype != torch.float32:
        return None
    source, operator = operator, operator.by_row()
    if operator.activations:
        rounding = quantized_product(operator) if qdq else rounding_product(operator)
        return None if rounding is None else Packed(source, *rounding)
    if operator.bits == 4 and not qdq:
        made = four_bit(operator, accuracy_level)
        if made is not None:
            return Packed(source, *made)
    if operator.bits < 4:
        # Unpacked by standard operators, once when the session is made: the file holds two or three bits a value.
        return None
    return Packed(source, *dequantized(operator))
