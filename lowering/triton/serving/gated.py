"""Weights of which each token reads some columns: `recast::gated_matmul`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.gated_matmul.gated_op import gated_matmul
from recast.lowering.packed import Packed
from recast.passes.forms.gated import Gated
from recast.passes.forms.operator import Dense, Operator

__all__ = ["GATED", "serve"]

GATED = "triton gathered columns"


def serve(operator: Operator) -> Packed | None:
    """Hold the weight by its columns; None for what gates nothing, and for packed weights, whose own kernels read all of them."""
    if not isinstance(operator, Gated) or not isinstance(operator.weight, Dense) or operator.dtype == torch.float64:
        return None
    kept, threshold = operator.kept, operator.threshold
    held = {"columns": operator.weight.to_dense().T.contiguous()}
    if operator.norms is not None:
        held["norms"] = operator.norms.float()

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = gated_matmul(x, tensors["columns"], tensors.get("norms"), kept, threshold, None)
        return y

    return Packed(operator, GATED, held, run)
