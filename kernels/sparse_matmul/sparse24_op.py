"""`recast::sparse24_matmul`: a 2:4 weight in lane order times floating activations, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, or for many tokens a library that uses the sparse matrix units, if
the weight is there in its layout too; elsewhere plain torch, which writes the weight out. The way and the tile are chosen by the
number of tokens when it runs, so no graph is compiled again for another number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.sparse_matmul.lanes import from_lanes
from recast.kernels.sparse_matmul.launch import launch
from recast.kernels.sparse_matmul.library import multiply
from recast.kernels.tiles import interpreting

__all__ = ["sparse24_matmul"]


@torch.library.custom_op("recast::sparse24_matmul", mutates_args=())
def sparse24_matmul(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    packed: Tensor | None = None,
    meta: Tensor | None = None,
    few: int = 0,
) -> Tensor:
    """Multiply vectors by a 2:4 weight, ``x Wᵀ + bias``.

    Parameters
    ----------
    x
        (..., n), float16 or bfloat16, the dtype of the weight's values.
    values, places
        int32 (m, words) in lane order (`lanes.to_lanes`).
    bias
        (m,) or None.
    packed, meta, few
        The same weight once more, in the layout of a library (`library.packed`), and the most vectors for which it is not used; as
        many bytes again, 9/8 of the dense ones in all. Or None, 0: the kernel multiplies any number.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x and the bias; the weight is a constant.

    Examples
    --------
    >>> from recast.kernels.sparse_matmul.lanes import to_lanes
    >>> half = torch.float16
    >>> words, marks = to_lanes(torch.tensor([[5.0, 7.0]], dtype=half), torch.tensor([[1, 3]]))  # 0 5 0 7
    >>> sparse24_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=half), words, marks, None).tolist()
    [[38.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    if packed is not None and x.device.type == "cuda" and flat.shape[0] > few:
        y = multiply(flat, packed, meta, bias)
    elif x.device.type == "cuda" or interpreting():
        y = launch(flat, values, places, bias)
    else:
        weight = from_lanes(values, places, x.dtype, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], values.shape[0])


@sparse24_matmul.register_fake
def _(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, *_rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, places, bias, *_ = inputs
    ctx.save_for_backward(values, places)
    ctx.features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, places = ctx.saved_tensors
    to_x = gradient @ from_lanes(values, places, gradient.dtype, ctx.features) if ctx.needs_input_grad[0] else None
    to_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, to_bias, None, None, None


sparse24_matmul.register_autograd(_gradients, setup_context=_keep)
