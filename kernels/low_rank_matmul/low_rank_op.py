"""`recast::low_rank_matmul`: floating activations times two thin matrices, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) few tokens go through Triton kernels (`launch` has the count of bytes), many through the
library's products; elsewhere it is the reference. The number of tokens decides when it runs, so no graph is compiled again; where
it lies is an operand, which `recast.lower` measures on the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.low_rank_matmul import reference
from recast.kernels.low_rank_matmul.launch import launch
from recast.kernels.tiles import interpreting

__all__ = ["bound_by_memory", "low_rank_matmul"]


def bound_by_memory(dtype: torch.dtype) -> int:
    """Return up to how many tokens a weight is multiplied so little, for each time it is read, that reading it decides.

    Examples
    --------
    >>> bound_by_memory(torch.bfloat16), bound_by_memory(torch.float32), bound_by_memory(torch.float64)
    (64, 16, 0)
    """
    # A product of float32 is three on the matrix units: more tokens take more operations than the 24 that an H200 has for a number.
    return {2: 64, 4: 16}.get(dtype.itemsize, 0)


def _product(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int) -> Tensor:
    """Vectors (tokens, n) times both factors, which have x's dtype."""
    kernel = (x.device.type == "cuda" or interpreting()) and x.dtype != torch.float64
    if kernel and (few == -1 or x.shape[0] <= few):
        return launch(x, left, right, bias)
    return reference.low_rank_matmul(x, left, right, bias)


@torch.library.custom_op("recast::low_rank_matmul", mutates_args=())
def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int | None = None) -> Tensor:
    """Multiply vectors by a weight of low rank, ``(x rightᵀ) leftᵀ + bias``.

    Parameters
    ----------
    x
        (..., n), floating.
    left, right
        (m, rank) and (rank, n); taken in x's dtype.
    bias
        (m,) or None.
    few
        The most vectors for which the kernels run, -1 for any number; `bound_by_memory` of x's dtype if not given.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x, both factors and the bias.

    Examples
    --------
    >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> low_rank_matmul(torch.tensor([[1.0, 1.0, 0.0]]), left, right, None).tolist()
    [[7.0, 14.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    few = bound_by_memory(x.dtype) if few is None else few
    y = _product(flat, left.to(x.dtype), right.to(x.dtype), None if bias is None else bias.to(x.dtype), few)
    return y.reshape(*x.shape[:-1], left.shape[0])


@low_rank_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], left.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.few = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, left, right, bias = ctx.saved_tensors
    flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    near, far = left.to(x.dtype), right.to(x.dtype)
    to_x = to_left = to_right = to_bias = None
    if ctx.needs_input_grad[0]:
        # The transposed weight is of low rank too, its factors the transposed ones in the other order.
        to_x = low_rank_matmul(gradient, far.T, near.T, None, ctx.few)
    if ctx.needs_input_grad[1]:
        to_left = (back.T @ (flat @ far.T)).to(left.dtype)
    if ctx.needs_input_grad[2]:
        to_right = ((back @ near).T @ flat).to(right.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        to_bias = back.sum(0).to(bias.dtype)
    return to_x, to_left, to_right, to_bias, None


low_rank_matmul.register_autograd(_gradients, setup_context=_keep)
