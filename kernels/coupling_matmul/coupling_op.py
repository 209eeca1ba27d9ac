"""`recast::coupling_matmul`: groups of features coupled feature by feature, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.coupling_matmul import reference
from recast.kernels.coupling_matmul.launch import DTYPES, launch
from recast.kernels.tiles import interpreting

__all__ = ["coupling_matmul"]


@torch.library.custom_op("recast::coupling_matmul", mutates_args=())
def coupling_matmul(x: Tensor, weights: Tensor) -> Tensor:
    """Couple groups of r features each: ``y[i, f] = sum_j weights[i, j, f] x[j, f]``.

    Parameters
    ----------
    x
        (..., J r), floating, one group after another.
    weights
        (I, J, r), taken in x's dtype.

    Returns
    -------
    (..., I r) in x's dtype. Gradients reach both operands.

    Examples
    --------
    >>> weights = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    >>> coupling_matmul(torch.tensor([[1.0, 1.0, 3.0, 4.0]]), weights).tolist()
    [[31.0, 82.0]]
    """
    flat, near = x.reshape(-1, x.shape[-1]), weights.to(x.dtype)
    kernel = x.dtype in DTYPES and (x.device.type == "cuda" or interpreting())
    y = launch(flat, near) if kernel else reference.coupling_matmul(flat, near)
    # An output of an operation is no view of an input, and contiguous.
    return y.reshape(*x.shape[:-1], y.shape[-1]).contiguous()


@coupling_matmul.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights.shape[0] * weights.shape[2]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weights = ctx.saved_tensors
    to_x = to_weights = None
    if ctx.needs_input_grad[0]:
        # The same coupling the other way round.
        to_x = coupling_matmul(gradient, weights.transpose(0, 1))
    if ctx.needs_input_grad[1]:
        flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        to_weights = reference.weights_gradient(flat, back, weights.shape[2]).to(weights.dtype)
    return to_x, to_weights


coupling_matmul.register_autograd(_gradients, setup_context=_keep)
