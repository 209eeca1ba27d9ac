"""Weights of which each token reads some columns: `recast::gate_cuts` and `recast::columns_matmul`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.gated_matmul.gated_op import columns_matmul, gate_cuts
from recast.kernels.gated_matmul.reference import gated
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
        norms = tensors.get("norms")
        cut = gate_cuts(x.detach(), norms, kept) if threshold is None else threshold
        y: Tensor = columns_matmul(gated(x, norms, cut, strictly=threshold is not None), tensors["columns"], None)
        return y

    return Packed(operator, GATED, held, run)
