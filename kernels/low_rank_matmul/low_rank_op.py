"""`recast::low_rank_matmul`: floating activations times two thin matrices, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) few tokens go through Triton kernels (`launch` has the count of bytes), many through the
library's products; elsewhere it is the reference. The number of tokens decides when it runs, so no graph is compiled again; where
it lies is an operand, which `recast.lower` measures on the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.epilogue.launch import finish
from recast.kernels.epilogue.reference import Epilogue, backward, finished
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


def _product(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int, epilogue: Epilogue) -> Tensor:
    """Vectors (tokens, n) times both factors, which have x's dtype."""
    kernel = (x.device.type == "cuda" or interpreting()) and x.dtype != torch.float64
    if kernel and (few == -1 or x.shape[0] <= few):
        return launch(x, left, right, bias, epilogue=epilogue)
    y = reference.low_rank_matmul(x, left, right, bias)
    if kernel and not epilogue.empty:
        return finish(y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format), epilogue)
    return finished(y, epilogue)


@torch.library.custom_op("recast::low_rank_matmul", mutates_args=())
def low_rank_matmul(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    few: int | None = None,
    activation: str = "",
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply vectors by a weight of low rank, ``f((x rightᵀ) leftᵀ + bias) * factor + residual``.

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
    activation
        f, one of `recast.kernels.epilogue.reference.ACTIVATIONS`, or "" for none.
    factor, residual
        (..., m) or None.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach all tensors.

    Raises
    ------
    ValueError
        There is no such activation.

    Examples
    --------
    >>> left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> low_rank_matmul(torch.tensor([[1.0, 1.0, 0.0]]), left, right, None).tolist()
    [[7.0, 14.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    few = bound_by_memory(x.dtype) if few is None else few
    epilogue = Epilogue.of(activation, False, factor, residual)
    y = _product(flat, left.to(x.dtype), right.to(x.dtype), None if bias is None else bias.to(x.dtype), few, epilogue)
    return y.reshape(*x.shape[:-1], left.shape[0])


@low_rank_matmul.register_fake
def _(x: Tensor, left: Tensor, *rest: Any, **more: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], left.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.few, ctx.activation, factor, residual = inputs
    ctx.save_for_backward(*tensors, factor, residual)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, left, right, bias, factor, residual = ctx.saved_tensors
    epilogue = Epilogue.of(ctx.activation, False, factor, residual)
    flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    near, far = left.to(x.dtype), right.to(x.dtype)
    to_x = to_left = to_right = to_bias = to_factor = to_residual = None
    if not epilogue.empty:
        to_residual = None if residual is None else gradient
        sums = low_rank_matmul(x, left, right, bias, ctx.few)
        back, to_factor = backward(back, sums.reshape(-1, sums.shape[-1]), epilogue)
        to_factor = None if factor is None or to_factor is None else to_factor.reshape(factor.shape)
    if ctx.needs_input_grad[0]:
        # The transposed weight is of low rank too, its factors the transposed ones in the other order.
        to_x = low_rank_matmul(back, far.T, near.T, None, ctx.few).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        to_left = (back.T @ (flat @ far.T)).to(left.dtype)
    if ctx.needs_input_grad[2]:
        to_right = ((back @ near).T @ flat).to(right.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        to_bias = back.sum(0).to(bias.dtype)
    return to_x, to_left, to_right, to_bias, None, None, to_factor, to_residual


low_rank_matmul.register_autograd(_gradients, setup_context=_keep)
