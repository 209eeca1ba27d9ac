"""`recast::gated_matmul`: a weight held by its columns times vectors whose inputs are gated, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it for up to `launch.FEW` vectors; more of them want nearly every
column between them, and take the library's product with zeros for what is left out. Which of the two is decided by the number of
vectors when it runs, so no graph is compiled again for another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.gated_matmul import reference
from recast.kernels.gated_matmul.launch import FEW, LARGEST, launch
from recast.kernels.tiles import interpreting

__all__ = ["gated_matmul"]


@torch.library.custom_op("recast::gated_matmul", mutates_args=())
def gated_matmul(
    x: Tensor, columns: Tensor, norms: Tensor | None, kept: int, threshold: float | None, bias: Tensor | None
) -> Tensor:
    """Multiply vectors, of which only some inputs count, by a weight, ``(x ⊙ keep(x)) columns + bias``.

    Parameters
    ----------
    x
        (..., n), float32, float16 or bfloat16.
    columns
        (n, m), the weight's columns, in x's dtype.
    norms
        float32 (n,) or None.
    kept, threshold
        As `reference.keeps` takes them.
    bias
        (m,) or None.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach the inputs that count, and the bias; the weight is a constant.

    Examples
    --------
    >>> columns = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    >>> gated_matmul(torch.tensor([[4.0, 1.0, -5.0]]), columns, None, 2, None, None).tolist()
    [[-11.0, -110.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    sized = threshold is not None or x.shape[-1] <= LARGEST
    if (x.device.type == "cuda" or interpreting()) and 0 < len(flat) <= FEW and sized:
        y = launch(flat, columns, norms, kept, threshold, bias)
    else:
        y = reference.gated_matmul(flat, columns, norms, kept, threshold, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], columns.shape[1])


@gated_matmul.register_fake
def _(
    x: Tensor, columns: Tensor, norms: Tensor | None, kept: int, threshold: float | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, columns, norms, kept, threshold, bias = inputs
    ctx.save_for_backward(x, columns, norms)
    ctx.gate, ctx.bias_dtype = (kept, threshold), None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, columns, norms = ctx.saved_tensors
    to_x = None
    if ctx.needs_input_grad[0]:
        to_x = torch.where(reference.keeps(x, norms, *ctx.gate), gradient @ columns.T, 0)
    to_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, None, None, to_bias


gated_matmul.register_autograd(_gradients, setup_context=_keep)
