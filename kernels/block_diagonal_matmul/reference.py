"""The meaning of a product with a block-diagonal matrix, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_diagonal_matmul", "block_diagonal_to_dense"]


def block_diagonal_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Apply a block-diagonal matrix to vectors.

    Parameters
    ----------
    x
        (..., b q), cut into b slices of q features.
    blocks
        (b, p, q), the blocks on the diagonal.

    Returns
    -------
    (..., b p), slice i being ``blocks[i] @ x_i``.

    Examples
    --------
    >>> blocks = torch.tensor([[[2.0]], [[3.0]]])
    >>> block_diagonal_matmul(torch.tensor([1.0, 10.0]), blocks).tolist()
    [2.0, 30.0]
    """
    b, p, q = blocks.shape
    if x.shape[-1] != b * q:
        raise ValueError(f"block_diagonal_matmul: x has {x.shape[-1]} features, {b} blocks of {q} take {b * q}")
    # One batched product over the blocks: (b, tokens, q) @ (b, q, p).
    slices = x.reshape(-1, b, q).transpose(0, 1)
    return torch.bmm(slices, blocks.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], b * p)


def block_diagonal_to_dense(blocks: Tensor) -> Tensor:
    """Write blocks (b, p, q) out as the matrix (b p, b q), zero off the diagonal."""
    b, p, q = blocks.shape
    dense = blocks.new_zeros(b, p, b, q)
    index = torch.arange(b, device=blocks.device)
    dense[index, :, index, :] = blocks
    return dense.reshape(b * p, b * q)
