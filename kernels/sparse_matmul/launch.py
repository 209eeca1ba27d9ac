"""Calls the Triton kernel of 2:4 weights: its tile, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.sparse_matmul.lanes import BLOCK
from recast.kernels.tiles import Tile, interpreting, on_device, splits_for, tile_for

__all__ = ["launch"]


def launch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply vectors by a 2:4 weight in lane order.

    Parameters
    ----------
    x
        (tokens, n), float16 or bfloat16: the dtype of the weight's values.
    values, places
        As `lanes.to_lanes` gives them: int32 (m, words).
    bias
        (m,) or None.
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    import triton

    from recast.kernels.quantized_matmul.triton import sum_splits_kernel
    from recast.kernels.sparse_matmul.triton import sparse24_matmul_kernel

    tokens, features = x.shape
    rows = values.shape[0]
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = tile or tile_for(tokens)
    blocks = -(-features // BLOCK)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(tokens, tile.tokens)
    splits = splits or splits_for(tiles, blocks, tokens, x.device)
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)
    partial = x.new_empty((splits, tokens, rows), dtype=torch.float32) if splits > 1 else out
    with on_device(x):
        sparse24_matmul_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens), splits)](
            x, values, places, x if bias is None else bias, partial,
            tokens, rows, features, blocks,
            x.stride(0), values.stride(0), places.stride(0), rows, tokens * rows, per_split,
            HAS_BIAS=bias is not None, WIDE=interpreting(), ROWS=tile.rows, TOKENS=tile.tokens, WARPS=tile.warps,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            count = tokens * rows
            sum_splits_kernel[(triton.cdiv(count, 1024),)](partial, out, count, splits, BLOCK=1024)
    return out
