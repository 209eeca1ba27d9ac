"""Two of every four inputs, in 16-bit floats: `recast::sparse24_matmul`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.reference import unpack_bits
from recast.kernels.sparse_matmul.sparse24_op import sparse24_matmul
from recast.lowering.packed import Packed, plain
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["SPARSE24", "serve"]

SPARSE24 = "triton 2:4 matmul"


def serve(operator: Operator) -> Packed | None:
    """Lay out values and places; None for what is not N of every M, and for codes."""
    if not isinstance(operator, NMSparse):
        return None
    dtype, values = operator.dtype, operator.values
    if (operator.keep, operator.of) != (2, 4) or operator.features % 4:
        return plain(
            operator, f"aten ({operator.keep} of every {operator.of} of {operator.features} inputs: no kernel)"
        )
    if isinstance(values, Quantized | Codebook):
        return None  # `sparse24_codes` serves these
    if dtype not in (torch.bfloat16, torch.float16) or not isinstance(values, Dense):
        return plain(operator, "aten (2:4 of values that are not 16-bit floats: no kernel yet)")
    places = unpack_bits(operator.indices, 2, values.shape[1])
    words, marks = to_lanes(values.to_dense(), places)

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = sparse24_matmul(x.to(dtype), tensors["values"], tensors["places"], None)
        return y.to(x.dtype)

    return Packed(operator, SPARSE24, {"values": words, "places": marks}, run)
