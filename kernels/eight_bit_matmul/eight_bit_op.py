"""`recast::eight_bit_matmul`: eight-bit codes times an eight-bit weight, as one operation of a graph.

On a GPU (or under ``TRITON_INTERPRET=1``) the Triton kernel runs it, elsewhere plain torch. Rounding the inputs before it and
scaling by token after it are plain tensor code, which compilers fuse with their neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul import library, reference
from recast.kernels.eight_bit_matmul.launch import launch
from recast.kernels.tiles import interpreting

__all__ = ["eight_bit_matmul"]


@torch.library.custom_op("recast::eight_bit_matmul", mutates_args=())
def eight_bit_matmul(codes: Tensor, weight: Tensor, scale: Tensor, few: int = -1) -> Tensor:
    """Multiply vectors by a weight of the same format and scale each output.

    Parameters
    ----------
    codes
        (..., n), int8 or float8_e4m3fn.
    weight
        (m, n), of the same dtype.
    scale
        (m,) float32.
    few
        The most vectors for which the kernel runs, -1 for any number; more go to the library's product of such numbers where it has
        one for the shape.

    Returns
    -------
    (..., m) float32. Codes have no gradient: what rounds them decides what stands for it.

    Examples
    --------
    >>> codes, weight = torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, 1.5]])
    >>> eight = torch.float8_e4m3fn
    >>> eight_bit_matmul(codes.to(eight), weight.to(eight), torch.tensor([2.0])).tolist()
    [[11.0]]
    """
    flat = codes.reshape(-1, codes.shape[-1])
    kernel = codes.device.type == "cuda" or interpreting()
    if 0 <= few < flat.shape[0] and library.serves(flat, weight):
        y = library.eight_bit_matmul(flat, weight, scale)
    elif kernel:
        y = launch(flat, weight, scale)
    else:
        y = reference.eight_bit_matmul(flat, weight, scale)
    return y.reshape(*codes.shape[:-1], weight.shape[0])


@eight_bit_matmul.register_fake
def _(codes: Tensor, weight: Tensor, scale: Tensor, few: int = -1) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)
