"""Products of two dense factors: `recast::low_rank_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recast.kernels.low_rank_matmul.low_rank_op import low_rank_matmul
from recast.lowering.packed import Packed
from recast.lowering.triton.few import measured_few
from recast.passes.forms.algebra import Product
from recast.passes.forms.operator import Dense, Operator

__all__ = ["LOW_RANK", "serve"]

LOW_RANK = "triton low-rank matmul"


def serve(operator: Operator) -> Packed | None:
    """Hold both factors as they are; None for what is no product of two dense ones."""
    if not isinstance(operator, Product):
        return None
    left, right = operator.left, operator.right
    if not isinstance(left, Dense) or not isinstance(right, Dense) or operator.dtype == torch.float64:
        return None

    held = {"left": left.to_dense(), "right": right.to_dense()}

    def multiply(tensors: Mapping[str, Tensor], x: Tensor, few: int | None) -> Tensor:
        y: Tensor = low_rank_matmul(x, tensors["left"], tensors["right"], None, few)
        return y

    about: tuple[Any, ...] = operator.shape[1], operator.dtype, held["left"].device, "low rank", *held["left"].shape
    few = measured_few(functools.partial(multiply, held), *about)
    # Where nothing was timed, as many as memory decides for.
    return Packed(operator, LOW_RANK, held, functools.partial(multiply, few=few))
