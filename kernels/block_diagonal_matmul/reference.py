"""The meaning of a product with a block-diagonal matrix, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "PADDING",
    "block_diagonal_matmul",
    "block_diagonal_to_dense",
    "block_inputs",
    "block_matmul",
    "in_block_order",
    "out_of_block_order",
]

# Columns of blocks may be filled up with zeros to a multiple of this, so that every row begins where 16 bytes are loaded at once.
PADDING = 16


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


def in_block_order(x: Tensor, index: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Return features in the order of the blocks.

    Parameters
    ----------
    x
        (..., n).
    index
        (n,): feature f of the blocks stands at ``index[f]``. Or None.
    grid
        Where there is no index, (rows, columns, width): feature f of the blocks, read as (row, column, within), stands at (column,
        row, within). Empty where features stand in the order of the blocks.

    Examples
    --------
    >>> in_block_order(torch.arange(6), None, (2, 3, 1)).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    if index is not None:
        return x.index_select(-1, index)
    if not grid:
        return x
    rows, columns, width = grid
    return x.reshape(*x.shape[:-1], columns, rows, width).transpose(-2, -3).reshape(x.shape)


def out_of_block_order(y: Tensor, index: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Put features where they stand: undoes `in_block_order`.

    Examples
    --------
    >>> out_of_block_order(torch.tensor([0, 2, 4, 1, 3, 5]), None, (2, 3, 1)).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if index is not None:
        return torch.zeros_like(y).index_copy(-1, index.long(), y)
    if not grid:
        return y
    rows, columns, width = grid
    return y.reshape(*y.shape[:-1], rows, columns, width).transpose(-2, -3).reshape(y.shape)


def block_inputs(x: Tensor, blocks: Tensor) -> int:
    """Return how many features a block takes, which are those of its columns that are not padding.

    Raises
    ------
    ValueError
        The features of x do not go with the blocks.

    Examples
    --------
    >>> block_inputs(torch.ones(4, 6), torch.zeros(2, 5, 16))
    3
    """
    b, _, columns = blocks.shape
    inputs = x.shape[-1] // b if b else 0
    if inputs * b != x.shape[-1] or not 0 <= columns - inputs < PADDING:
        raise ValueError(f"block_matmul: x has {x.shape[-1]} features, {b} blocks of {columns} take {b * columns}")
    return inputs


def block_matmul(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    in_grid: Sequence[int] = (),
    out_grid: Sequence[int] = (),
) -> Tensor:
    """Apply a block-diagonal matrix to features that stand in another order, and put its outputs into another one.

    ``y[out(b, i)] = sum_j blocks[b, i, j] x[in(b, j)] + bias[out(b, i)]``

    Parameters
    ----------
    x
        (..., b q).
    blocks
        (b, p, q), or with up to `PADDING` - 1 columns of zeros more.
    bias
        (b p,) in the order of the result, or None.
    gather, in_grid
        Where the blocks' inputs stand in x, as `in_block_order` has it: an index, or a grid, or as they are.
    scatter, out_grid
        Where their outputs stand in the result.

    Returns
    -------
    (..., b p).

    Examples
    --------
    >>> blocks = torch.tensor([[[2.0, 1.0]], [[3.0, 1.0]]])
    >>> block_matmul(torch.tensor([1.0, 10.0, 100.0, 1000.0]), blocks, in_grid=(2, 2, 1)).tolist()  # 0 and 2, 1 and 3
    [102.0, 1030.0]
    """
    inputs = block_inputs(x, blocks)
    y = block_diagonal_matmul(in_block_order(x, gather, in_grid), blocks[:, :, :inputs])
    y = out_of_block_order(y, scatter, out_grid)
    return y if bias is None else y + bias.to(y.dtype)
