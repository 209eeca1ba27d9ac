"""Calls the Triton kernel of dense blocks on a diagonal: its tile, splits, and sums that are left to what follows.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.kernels.tiles import Cut, Tile, cut, interpreting, on_device

__all__ = ["TILES", "block_tile", "launch", "step_of", "sums_as_loaded"]

# By the most tokens that they serve. The weight goes through shared memory, some steps ahead.
TILES = {
    "cuda": (
        (8, Tile(32, 8, 2, 4)),
        (16, Tile(32, 16, 2, 4)),
        (32, Tile(64, 32, 4, 3)),
        (64, Tile(64, 64, 4, 3)),
        (math.inf, Tile(128, 128, 8, 3)),
    ),
    "hip": (
        (16, Tile(32, 16, 2, 2)),
        (64, Tile(64, 64, 4, 2)),
        (math.inf, Tile(128, 128, 8, 2)),
    ),
}


def block_tile(tokens: int, backend: str | None = None) -> Tile:
    """Return the tile for a number of tokens, on "cuda" or "hip" (default: what torch was built for).

    Examples
    --------
    >>> block_tile(1, "cuda").rows, block_tile(4096, "cuda").rows
    (32, 128)
    """
    tiles = TILES[backend or ("cuda" if torch.version.hip is None else "hip")]
    return next(tile for most, tile in tiles if tokens <= most)


def step_of(width: int, tile: Tile, summed: int = 1) -> int:
    """Return how many inputs of a block are taken at a time, fewer where they come in many sums: these share the memory.

    Examples
    --------
    >>> step_of(4096, block_tile(1, "cuda")), step_of(24, block_tile(1, "cuda"))
    (128, 32)
    """
    most = 64 if tile.tokens > 64 else 128
    if summed > 1:
        most = min(most, max(32, 4096 // (tile.tokens * (1 << (summed - 1).bit_length()))))
    return min(most, max(16, 1 << (width - 1).bit_length()))


def sums_as_loaded(splits: int, tokens: int, tile: Tile, dtype: torch.dtype) -> bool:
    """Say whether a tile that adds up partial sums while loading them reads no more of these than of its weight.

    Examples
    --------
    >>> tile = block_tile(1, "cuda")
    >>> sums_as_loaded(8, 1, tile, torch.bfloat16), sums_as_loaded(8, 8, tile, torch.bfloat16)
    (True, False)
    """
    return splits * min(tokens, tile.tokens) * torch.float32.itemsize <= tile.rows * dtype.itemsize


def launch(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    add: bool = True,
    as_loaded: bool | None = None,
) -> Tensor:
    """Multiply vectors by dense blocks on a diagonal.

    Parameters
    ----------
    x
        (tokens, n), or float32 (sums, tokens, n): partial sums of vectors.
    blocks
        (b, p, q) of any strides. The last block may go beyond the n inputs and the rows.
    bias
        (rows,) or None.
    rows
        Outputs.
    tile, splits
        Chosen by the number of tokens and the device if not given.
    add
        Whether the result's partial sums are added up here; otherwise they are the result, where there are several.
    as_loaded
        Whether x's sums are added up by this kernel, or before by one of their own; chosen by the bytes if not given.

    Returns
    -------
    (tokens, rows) in the blocks' dtype, or float32 (splits, tokens, rows).
    """
    from recast.kernels.block_diagonal_matmul.triton import block_matmul_kernel
    from recast.kernels.quantized_matmul.launch import add_up

    tile = tile or block_tile(x.shape[-2])
    if x.dim() == 3:
        if as_loaded is None:
            as_loaded = sums_as_loaded(x.shape[0], x.shape[1], tile, blocks.dtype)
        x = x if as_loaded else add_up(x.contiguous(), torch.empty_like(x[0], dtype=blocks.dtype))
    sums = x if x.dim() == 3 else x.unsqueeze(0)
    summed, tokens, features = sums.shape
    count, height, width = blocks.shape
    out = x.new_empty((tokens, rows), dtype=blocks.dtype)
    if not out.numel():
        return out
    sums = sums if sums.stride(2) == 1 else sums.contiguous()
    step = step_of(width, tile, summed)
    cuts = _cut(sums[0], count, height, -(-width // step), tile, splits)
    partial = cuts.partial(out)
    with on_device(x):
        block_matmul_kernel[cuts.grid](
            sums, blocks, x if bias is None else bias, partial,
            tokens, rows, features, height, width, -(-height // tile.rows),
            sums.stride(1), sums.stride(0), *blocks.stride(), rows, tokens * rows, cuts.per_split,
            SUMMED=summed, HAS_BIAS=bias is not None, WIDE=interpreting(),
            ROWS=tile.rows, TOKENS=tile.tokens, STEP=step, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return add_up(partial, out) if add else partial


def _cut(x: Tensor, count: int, height: int, steps: int, tile: Tile, splits: int | None) -> Cut:
    """As `cut`, with tiles that do not reach from one block into the next."""
    tiles = count * -(-height // tile.rows)
    return cut(x, tiles * tile.rows, steps, tile, splits)
