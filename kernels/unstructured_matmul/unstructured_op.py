"""`recast::unstructured_matmul`: a weight of values at any places times floating activations, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernels run it, elsewhere the reference. Which of the two ways, and which tile, is
chosen by the number of tokens when it runs, so no graph is compiled again for another number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.tiles import interpreting
from recast.kernels.unstructured_matmul import reference
from recast.kernels.unstructured_matmul.lanes import from_lanes
from recast.kernels.unstructured_matmul.launch import MOST_TOKENS, launch, write_out

__all__ = ["unstructured_matmul"]


@torch.library.custom_op("recast::unstructured_matmul", mutates_args=())
def unstructured_matmul(
    x: Tensor, values: Tensor, words: Tensor, starts: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, few: int
) -> Tensor:
    """Multiply vectors by a weight of values at any places, ``x Wᵀ + bias``.

    Parameters
    ----------
    x
        (..., n), floating, the dtype of the values.
    values, words, starts, offsets
        The weight in lane order, as `lanes.to_lanes` gives it.
    bias
        (rows,) or None.
    rows
        m.
    few
        The most vectors for which the weight is decoded on its way to the matrix units, 64 at most, 8 in float32; more are
        multiplied with it written out, by the matrix library.

    Returns
    -------
    (..., rows) in x's dtype. Gradients reach x and the bias; the weight is a constant.

    Raises
    ------
    ValueError
        The values are of another dtype than x.

    Notes
    -----
    Loaded as sparse and computed as dense: Xia et al., Flash-LLM (2023). Places in a bitmap: Fan et al., SpInfer (2025).

    Examples
    --------
    >>> from recast.kernels.unstructured_matmul.lanes import to_lanes
    >>> held = to_lanes(torch.tensor([[0.0, 5.0], [7.0, 8.0]]))
    >>> unstructured_matmul(torch.tensor([[1.0, 2.0]]), *held, None, 2, 64).tolist()
    [[10.0, 23.0]]
    """
    flat, held = x.reshape(-1, x.shape[-1]), (values, words, starts, offsets)
    if x.dtype not in MOST_TOKENS or not (x.device.type == "cuda" or interpreting()):
        y = reference.unstructured_matmul(flat, *held, bias, rows)
    elif flat.shape[0] <= min(few, MOST_TOKENS[x.dtype]):
        y = launch(flat, *held, bias, rows)
    else:
        weight = write_out(*held, rows, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], rows)


@unstructured_matmul.register_fake
def _(
    x: Tensor, values: Tensor, words: Tensor, starts: Tensor, offsets: Tensor, bias: Tensor | None, rows: int, few: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *held, bias, rows, _ = inputs
    ctx.save_for_backward(*held)
    ctx.rows, ctx.features, ctx.bias_dtype = rows, x.shape[-1], None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        values, words, starts, offsets = ctx.saved_tensors
        to_x = gradient @ from_lanes(values, words, starts, offsets, ctx.rows, ctx.features).to(gradient.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, ctx.rows).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, None, None, to_bias, None, None


unstructured_matmul.register_autograd(_gradients, setup_context=_keep)
