"""`recast::block_matmul`: blocks on a diagonal times vectors whose features stand in another order, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch. The tile is chosen by the number of
tokens when it runs, so no graph is compiled again for another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul import reference
from recast.kernels.block_diagonal_matmul.launch import DTYPES, launch
from recast.kernels.tiles import interpreting

__all__ = ["block_matmul"]


@torch.library.custom_op("recast::block_matmul", mutates_args=())
def block_matmul(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    in_grid: Sequence[int],
    out_grid: Sequence[int],
    few: int = -1,
) -> Tensor:
    """Multiply vectors by blocks on a diagonal: ``y[out(b, i)] = sum_j blocks[b, i, j] x[in(b, j)] + bias[out(b, i)]``.

    Parameters
    ----------
    x
        (..., b q).
    blocks
        (b, p, q) in x's dtype, or with less than sixteen columns of zeros more.
    bias
        (b p,) in the order of the result, or None.
    gather, in_grid
        Where the inputs of the blocks stand in x: an int32 index (b q,), or None and a grid (rows, columns, width) of which they are
        the rows and x holds the columns one after another, or None and nothing if they stand in the order of the blocks.
    scatter, out_grid
        The same of outputs, (b p,).
    few
        The most vectors for which the kernel runs, -1 for any number; more are reordered and go to the library's batched product.

    Returns
    -------
    (..., b p) in x's dtype. Gradients reach x, the blocks and the bias.

    Examples
    --------
    >>> blocks = torch.tensor([[[2.0, 1.0]], [[3.0, 1.0]]])
    >>> x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    >>> block_matmul(x, blocks, None, None, None, [], []).tolist()
    [[12.0, 1300.0]]
    >>> block_matmul(x, blocks, None, None, None, [2, 2, 1], []).tolist()
    [[102.0, 1030.0]]
    """
    flat, inputs = x.reshape(-1, x.shape[-1]), reference.block_inputs(x, blocks)
    kernel = x.dtype in DTYPES and (x.device.type == "cuda" or interpreting())
    if kernel and (few == -1 or flat.shape[0] <= few):
        y = launch(
            flat, blocks, bias, blocks.shape[0] * blocks.shape[1],
            inputs=inputs, gather=gather, scatter=scatter, in_grid=in_grid, out_grid=out_grid,
        )  # fmt: skip
    else:
        y = reference.block_matmul(flat, blocks, bias, gather, scatter, in_grid, out_grid)
    # An output of an operation is no view of an input, and contiguous.
    return y.reshape(*x.shape[:-1], y.shape[-1]).contiguous()


@block_matmul.register_fake
def _(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    in_grid: Sequence[int],
    out_grid: Sequence[int],
    few: int = -1,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], blocks.shape[0] * blocks.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, blocks, bias, gather, scatter, in_grid, out_grid, ctx.few = inputs
    ctx.save_for_backward(x, blocks, gather, scatter)
    ctx.grids = list(in_grid), list(out_grid)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, blocks, gather, scatter = ctx.saved_tensors
    in_grid, out_grid = ctx.grids
    (count, rows, columns), inputs = blocks.shape, reference.block_inputs(x, blocks)
    to_x = to_blocks = to_bias = None
    if ctx.needs_input_grad[0]:
        # The same product with the blocks transposed, and the orders exchanged.
        turned = blocks[:, :, :inputs].transpose(1, 2)
        to_x = block_matmul(gradient, turned, None, scatter, gather, out_grid, in_grid, ctx.few)
    if ctx.needs_input_grad[1]:
        seen = reference.in_block_order(x.reshape(-1, x.shape[-1]), gather, in_grid).reshape(-1, count, inputs)
        wanted = reference.in_block_order(gradient.reshape(-1, gradient.shape[-1]), scatter, out_grid)
        to_blocks = torch.bmm(wanted.reshape(-1, count, rows).permute(1, 2, 0), seen.transpose(0, 1))
        to_blocks = torch.nn.functional.pad(to_blocks, (0, columns - inputs))
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return to_x, to_blocks, to_bias, None, None, None, None, None


block_matmul.register_autograd(_gradients, setup_context=_keep)
