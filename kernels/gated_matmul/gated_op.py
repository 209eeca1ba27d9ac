"""`recast::gate_cuts` and `recast::columns_matmul`: from which score on inputs count, and products that read their columns alone.

Between the two stands ``torch.where``, which Inductor puts into whatever makes x. On a GPU (or under ``TRITON_INTERPRET=1``) Triton
kernels run both, the second for up to `launch.FEW` vectors: more of them want nearly every column between them, and take the
library's product. Which of the two is decided by the number of vectors when it runs, so no graph is compiled again for another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.gated_matmul import reference
from recast.kernels.gated_matmul.launch import FEW, LARGEST, launch_columns, launch_cuts
from recast.kernels.tiles import interpreting

__all__ = ["columns_matmul", "gate_cuts"]


def _kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or interpreting()


@torch.library.custom_op("recast::gate_cuts", mutates_args=())
def gate_cuts(x: Tensor, norms: Tensor | None, kept: int) -> Tensor:
    """Find the score of each vector's `kept`-th largest input.

    Parameters
    ----------
    x
        (..., n), float32, float16 or bfloat16.
    norms
        float32 (n,): scores are ``|x_j| norms_j``. None: ``|x_j|``.
    kept
        1 to n.

    Returns
    -------
    float32 (..., 1). No gradient goes through it.

    Examples
    --------
    >>> gate_cuts(torch.tensor([[3.0, -1.0, 2.0]]), None, 2).tolist()
    [[2.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    if _kernels(x) and len(flat) and x.shape[-1] <= LARGEST:
        cuts = launch_cuts(flat, norms, kept)
    else:
        cuts = reference.cuts_of(flat, norms, kept)
    return cuts.reshape(*x.shape[:-1], 1)


@gate_cuts.register_fake
def _(x: Tensor, norms: Tensor | None, kept: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


gate_cuts.register_autograd(lambda ctx, gradient: (None, None, None))


@torch.library.custom_op("recast::columns_matmul", mutates_args=())
def columns_matmul(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply vectors, many of whose inputs are zero, by a weight held by its columns, ``x columns + bias``.

    Parameters
    ----------
    x
        (..., n), float32, float16 or bfloat16.
    columns
        (n, m), in x's dtype. What stands in a column is not read, not even NaN, where its inputs are zero and vectors are few.
    bias
        (m,) or None.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach all three.

    Examples
    --------
    >>> columns = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    >>> columns_matmul(torch.tensor([[4.0, 0.0, -5.0]]), columns, None).tolist()
    [[-11.0, -110.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    if _kernels(x) and 0 < len(flat) <= FEW:
        y = launch_columns(flat, columns, bias)
    else:
        y = torch.nn.functional.linear(flat, columns.T, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], columns.shape[1])


@columns_matmul.register_fake
def _(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, columns, bias = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, columns)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, columns = ctx.saved_tensors
    to_x = gradient @ columns.T if ctx.needs_input_grad[0] else None
    to_columns = to_bias = None
    if ctx.needs_input_grad[1]:
        to_columns = x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, to_columns, to_bias


columns_matmul.register_autograd(_gradients, setup_context=_keep)
