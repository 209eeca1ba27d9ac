"""`recast::armor_matmul`: floating activations times a 2:4 core between two block-diagonal matrices, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) Triton kernels run it (`launch` says which), elsewhere plain torch, which writes the core
out. The number of tokens decides when it runs, so no graph is compiled again for another number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recast.kernels.armor_matmul import reference
from recast.kernels.armor_matmul.launch import launch
from recast.kernels.block_diagonal_matmul.launch import launch as launch_blocks
from recast.kernels.sparse_matmul.lanes import from_lanes
from recast.kernels.tiles import interpreting

__all__ = ["armor_matmul"]


@torch.library.custom_op("recast::armor_matmul", mutates_args=())
def armor_matmul(
    x: Tensor, values: Tensor, places: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int = -1
) -> Tensor:
    """Multiply vectors by ``A C B``: A and B of dense blocks on a diagonal, C with two of every four inputs.

    Parameters
    ----------
    x
        (..., n), float16 or bfloat16, the dtype of the core's values.
    values, places
        int32 (m, words), the core in lane order (`sparse_matmul.lanes.to_lanes`).
    left, right
        (⌈m / d⌉, d, d), A, and (⌈n / e⌉, e, e), B; the last blocks are zero beyond m and n.
    bias
        (m,) or None.
    few
        The most vectors for which the kernels run, -1 for any number; for more the core is written out and the library multiplies.

    Returns
    -------
    (..., m) in x's dtype. Gradients reach x, both block-diagonal matrices and the bias; the core is a constant.

    Examples
    --------
    >>> from recast.kernels.sparse_matmul.lanes import to_lanes
    >>> half = torch.float16
    >>> words, marks = to_lanes(torch.tensor([[5.0, 7.0]], dtype=half), torch.tensor([[1, 3]]))  # 0 5 0 7
    >>> left, right = torch.full((1, 1, 1), 2.0, dtype=half), torch.eye(4, dtype=half).unsqueeze(0)
    >>> armor_matmul(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=half), words, marks, left, right, None).tolist()
    [[76.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    left, right = left.to(x.dtype).contiguous(), right.to(x.dtype).contiguous()
    if _kernels(x) and (few == -1 or flat.shape[0] <= few):
        y = launch(flat, values, places, left, right, bias)
    else:
        core = from_lanes(values, places, x.dtype, x.shape[-1])
        y = reference.armor_matmul(flat, core, left, right, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], values.shape[0])


def _kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or interpreting()


def _blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Vectors (tokens, n) times square blocks on a diagonal."""
    return launch_blocks(x, blocks, None, x.shape[1]) if _kernels(x) else reference.blocks_matmul(x, blocks)


@armor_matmul.register_fake
def _(
    x: Tensor, values: Tensor, places: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, few: int = -1
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, places, left, right, bias = ctx.saved_tensors
    flat, back = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    core = from_lanes(values, places, x.dtype, x.shape[-1])
    near, far = left.to(x.dtype), right.to(x.dtype)
    to_x = to_left = to_right = to_bias = None
    if ctx.needs_input_grad[3]:
        to_left = _to_blocks(back, _blocks(flat, far) @ core.T, left)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
        inner = _blocks(back, near.transpose(1, 2)) @ core
        if ctx.needs_input_grad[0]:
            to_x = _blocks(inner, far.transpose(1, 2)).reshape(x.shape)
        if ctx.needs_input_grad[4]:
            to_right = _to_blocks(inner, flat, right)
    if bias is not None and ctx.needs_input_grad[5]:
        to_bias = back.sum(0).to(bias.dtype)
    return to_x, None, None, to_left, to_right, to_bias, None


def _to_blocks(gradient: Tensor, x: Tensor, blocks: Tensor) -> Tensor:
    """Gradient of blocks on a diagonal, zero beyond the last output and input."""
    side = blocks.shape[1]
    return (reference.in_blocks(gradient, side).transpose(1, 2) @ reference.in_blocks(x, side)).to(blocks.dtype)


armor_matmul.register_autograd(_gradients, setup_context=_keep)
