"""The meaning of a product with a matrix between two block-diagonal ones, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul.reference import block_diagonal_matmul

__all__ = ["armor_matmul", "blocks_matmul", "in_blocks"]


def in_blocks(x: Tensor, side: int) -> Tensor:
    """Cut vectors (tokens, n) into pieces (⌈n / side⌉, tokens, side), the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % side)).reshape(x.shape[0], -1, side).transpose(0, 1)


def blocks_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply vectors (tokens, n) by square blocks (b, d, d) on a diagonal, of which the last one may reach beyond n.

    Examples
    --------
    >>> blocks = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]])
    >>> blocks_matmul(torch.tensor([[1.0, 2.0, 3.0]]), blocks).tolist()
    [[3.0, 2.0, 6.0]]
    """
    n = x.shape[1]
    return block_diagonal_matmul(torch.nn.functional.pad(x, (0, -n % blocks.shape[1])), blocks)[:, :n]


def armor_matmul(x: Tensor, core: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply vectors by ``A C B``, blocks A on the diagonal of the outputs and B on that of the inputs.

    Parameters
    ----------
    x
        (tokens, n).
    core
        (m, n).
    left, right
        (⌈m / d⌉, d, d) and (⌈n / e⌉, e, e).
    bias
        (m,) or None.

    Returns
    -------
    (tokens, m).

    Examples
    --------
    >>> core, one = torch.tensor([[0.0, 3.0]]), torch.ones(1, 1, 1)
    >>> armor_matmul(torch.ones(1, 2), core, 2 * one, 5 * one.repeat(2, 1, 1)).tolist()
    [[30.0]]
    """
    y = blocks_matmul(blocks_matmul(x, right) @ core.T, left)
    return y if bias is None else y + bias
