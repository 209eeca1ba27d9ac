"""`recast::bitmap_matmul`: values at the bits set in a bitmap times floating activations, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs few tokens, the library's product with the weight written out
many; elsewhere plain torch writes it out. The number of tokens decides when it runs, so no graph is compiled again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.bitmap_matmul import reference
from recast.kernels.bitmap_matmul.launch import DTYPES, launch, write_out
from recast.kernels.tiles import interpreting

__all__ = ["bitmap_matmul"]


def _kernels(x: Tensor) -> bool:
    return x.dtype in DTYPES and (x.device.type == "cuda" or interpreting())


@torch.library.custom_op("recast::bitmap_matmul", mutates_args=())
def bitmap_matmul(
    x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None, rows: int, few: int
) -> Tensor:
    """Multiply vectors by a weight with values at the bits set in a bitmap, ``x Wᵀ + bias``.

    Parameters
    ----------
    x
        (..., n), floating.
    values, words, starts
        (k + 2,), taken in x's dtype, and int32 (⌈m / 4⌉, 16 ⌈n / 128⌉) and (⌈m / 4⌉, ⌈n / 128⌉): `reference.to_quads`.
    bias
        (m,) or None.
    rows
        m.
    few
        The most vectors for which the weight is decoded on its way to the matrix units; more are multiplied with the weight
        written out, by the matrix library. 0 or less: always decoded.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x, the values and the bias.

    Examples
    --------
    >>> held = reference.to_quads(torch.tensor([5.0, 7.0]), torch.tensor([[False, True], [True, False]]))
    >>> bitmap_matmul(torch.tensor([[1.0, 2.0]]), *held, None, 2, 0).tolist()
    [[10.0, 7.0]]
    """
    flat, near = x.reshape(-1, x.shape[-1]), values.to(x.dtype)
    if not _kernels(x):
        y = reference.bitmap_matmul(flat, near, words, rows, bias)
    elif few <= 0 or flat.shape[0] <= few:
        y = launch(flat, near, words, starts, bias, rows)
    else:
        weight = write_out(near, words, starts, rows, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], rows)


@bitmap_matmul.register_fake
def _(x: Tensor, values: Tensor, words: Tensor, starts: Tensor, bias: Tensor | None, rows: int, few: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, words, _, bias, ctx.rows, _ = inputs
    ctx.save_for_backward(x, values, words)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, words = ctx.saved_tensors
    flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    to_x = to_values = to_bias = None
    if ctx.needs_input_grad[0]:
        # What has many vectors, as training does, has the weight written out in any case.
        to_x = (back @ reference.from_quads(values.to(x.dtype), words, ctx.rows, x.shape[-1])).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        to_values = reference.of_places(back.T @ flat, words, values.shape[0]).to(values.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        to_bias = back.sum(0).to(ctx.bias_dtype)
    return to_x, to_values, None, None, to_bias, None, None


bitmap_matmul.register_autograd(_gradients, setup_context=_keep)
