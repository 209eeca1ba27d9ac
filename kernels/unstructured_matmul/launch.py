"""Calls the Triton kernels of values at any places: tile, splits and their sum, and the weight written out.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.tiles import Tile, cut, interpreting, on_device, precision_of

__all__ = ["MOST_TOKENS", "WRITTEN_OUT", "launch", "write_out"]

# The most vectors for each dtype there is a kernel for: more need more registers than there are, and are for the matrix library.
MOST_TOKENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 8}
# Rows and warps of a block that writes the weight out.
WRITTEN_OUT = Tile(64, 16, 4)


def launch(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply few vectors by a weight in lane order, decoded on its way to the matrix units.

    Parameters
    ----------
    x
        (tokens, n), in a dtype of `MOST_TOKENS`: that of the values.
    values, words, starts, offsets
        As `lanes.to_lanes` gives them, contiguous.
    bias
        (rows,) or None.
    rows
        m, which need not be whole units.
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, rows) in x's dtype.

    Raises
    ------
    ValueError
        The values are of another dtype than x.
    """
    from recast.kernels.epilogue.launch import add_up
    from recast.kernels.unstructured_matmul.triton import unstructured_matmul_kernel

    if values.dtype != x.dtype:
        raise ValueError(
            f"product with values at any places: they are {values.dtype} and x is {x.dtype}; alike is needed"
        )
    tokens, features = x.shape
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    units, blocks = offsets.shape
    cuts = cut(x, rows, blocks, tile, splits)
    partial = cuts.partial(out)
    with on_device(x):
        unstructured_matmul_kernel[cuts.grid](
            x, values, words, starts.view(torch.int32), offsets, x if bias is None else bias, partial,
            tokens, rows, features, units, blocks, x.stride(0), tokens * rows, cuts.per_split,
            HAS_BIAS=bias is not None, WIDE=interpreting(), PRECISION=precision_of(x.dtype),
            ROWS=cuts.tile.rows, TOKENS=cuts.tile.tokens, WARPS=cuts.tile.warps, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
        )  # fmt: skip
        return add_up(partial, out)


def write_out(values: Tensor, words: Tensor, starts: Tensor, offsets: Tensor, rows: int, features: int) -> Tensor:
    """Write a weight in lane order out: (rows, features), in the values' dtype, for many vectors, which use it often."""
    from recast.kernels.unstructured_matmul.triton import write_out_kernel

    out = values.new_empty((rows, features))
    if not out.numel():
        return out
    (units, blocks), tile = offsets.shape, WRITTEN_OUT
    with on_device(values):
        write_out_kernel[(-(-rows // tile.rows), blocks)](
            values, words, starts.view(torch.int32), offsets, out, rows, features, units, blocks,
            ROWS=tile.rows, WARPS=tile.warps, num_warps=tile.warps,
        )  # fmt: skip
    return out
