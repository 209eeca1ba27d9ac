"""Calls the Triton kernels of bitmap weights: the tile for a number of tokens, splits and their sum.

For a weight (m, n) of which a share d is marked, 16-bit values take ``2 d + 1/8 + 1/128`` bytes a place, where the dense one takes 2:
at a half 0.57 of it. Columns of 16 bits beside the values would take ``4 d``, as many bytes as the zeros at a half, and
more than a bitmap down to a sixteenth. A place takes 8.6 operations on an H200, of which it has 6.8 in the time in which memory
brings a place of density a half: the kernel is bound by them, at 0.8 of the memory's rate, and at all densities takes 0.71 of the
time in which memory brings the zeros too.

CoSpaDi's weight, a dictionary (k, n) after coefficients (m, k) of which a half is marked, is two launches: the library's product
with the dictionary, and this one. What stands between them is ``2 k`` bytes a token, 7.7 KB for k = 3863 (4096 to 14336 at a ratio
of 0.8), and stays in the cache. Dictionary and coefficients are 31.6 and 62.9 MB, for 117 MB of the dense weight: with the operations
on the coefficients 23 microseconds of an H200, for 24.5. At a ratio of 0.6 it is 17. Coefficients with their zeros would be 111 MB,
and the whole more than the dense weight: with many tokens they are written out all the same, once for all of them, and this form
then costs 1.21 times the dense weight's multiplications.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.kernels.bitmap_matmul.reference import STEP
from recast.kernels.tiles import Tile, cut, interpreting, on_device, precision_of

__all__ = ["DTYPES", "TILES", "WRITTEN_OUT", "constants", "launch", "tile_of", "write_out"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# By the most tokens that they serve: beyond, a weight is decoded again for every 64 of them.
TILES = {
    "cuda": ((8, Tile(32, 8, 2)), (16, Tile(32, 16, 2)), (32, Tile(64, 32, 4)), (math.inf, Tile(64, 64, 4))),
    "hip": ((16, Tile(32, 16, 2)), (math.inf, Tile(64, 64, 4))),
}
WRITTEN_OUT = Tile(64, 16, 4)  # rows and warps of a block that writes out


def tile_of(tokens: int, backend: str | None = None) -> Tile:
    """Return the tile for a number of tokens, on "cuda" or "hip" (default: what torch was built for).

    Examples
    --------
    >>> tile_of(1, "cuda").tokens, tile_of(4096, "cuda").tokens
    (8, 64)
    """
    tiles = TILES[backend or ("cuda" if torch.version.hip is None else "hip")]
    return next(tile for most, tile in tiles if tokens <= most)


def constants(dtype: torch.dtype, tile: Tile, backend: str | None = None) -> dict[str, object]:
    """Return the product's constants but for the bias."""
    return {
        "STEP": STEP,
        "PRECISION": precision_of(dtype, backend),
        "WIDE": interpreting(),
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "WARPS": tile.warps,
    }


def launch(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    rows: int,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply vectors by a bitmap weight.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    values, words, starts
        As `reference.to_quads` gives them, values in x's dtype.
    bias
        (rows,) or None.
    rows
        Outputs, m.
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    from recast.kernels.bitmap_matmul.triton import bitmap_matmul_kernel
    from recast.kernels.epilogue.launch import add_up

    tokens, features = x.shape
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    steps = starts.shape[1]
    cuts = cut(x, rows, steps, tile or tile_of(tokens), splits)
    partial = cuts.partial(out)
    with on_device(x):
        bitmap_matmul_kernel[cuts.grid](
            x, _bits(values), words, starts, x if bias is None else bias, partial,
            tokens, rows, features, words.shape[0], steps,
            x.stride(0), words.stride(0), starts.stride(0), rows, tokens * rows, cuts.per_split,
            HAS_BIAS=bias is not None, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
            **constants(x.dtype, cuts.tile),
        )  # fmt: skip
        return add_up(partial, out)


def write_out(values: Tensor, words: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    """Write a bitmap weight out, (rows, columns) in the dtype of its values: for many vectors, which use it often."""
    from recast.kernels.bitmap_matmul.triton import write_out_kernel

    out, tile = values.new_empty((rows, columns)), WRITTEN_OUT
    if not out.numel():
        return out
    with on_device(values):
        write_out_kernel[(-(-rows // tile.rows), starts.shape[1])](
            _bits(values), words, starts, out, rows, columns, words.shape[0],
            words.stride(0), starts.stride(0), out.stride(0),
            STEP=STEP, WIDE=interpreting(), ROWS=tile.rows, WARPS=tile.warps, num_warps=tile.warps,
        )  # fmt: skip
    return out


def _bits(values: Tensor) -> Tensor:
    """16-bit numbers as integers, which can be masked."""
    return values if values.dtype == torch.float32 else values.view(torch.int16)
