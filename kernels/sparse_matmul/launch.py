"""Calls the Triton kernel of 2:4 weights: its tile, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from torch import Tensor

from recast.kernels.sparse_matmul.lanes import BLOCK
from recast.kernels.tiles import Tile, cut, interpreting, on_device, tile_for

__all__ = ["covers", "launch"]


def launch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None,
    *,
    outer: Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
    add: bool = True,
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
    outer
        (b, d, d), contiguous, in x's dtype: dense blocks on a diagonal that multiply the outputs, the last one reaching beyond
        them maybe. For one split, and tiles of whole blocks (`covers`). Or None.
    tile, splits
        Chosen by the number of tokens and the device if not given.
    add
        Whether partial sums are added up here; otherwise they are the result, where there are several.

    Returns
    -------
    (tokens, m) in x's dtype, or float32 (splits, tokens, m).
    """
    from recast.kernels.epilogue.launch import add_up
    from recast.kernels.sparse_matmul.triton import sparse24_matmul_kernel

    tokens, features = x.shape
    rows = values.shape[0]
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = -(-features // BLOCK)
    cuts = cut(x, rows, blocks, tile, splits)
    partial = cuts.partial(out)
    with on_device(x):
        sparse24_matmul_kernel[cuts.grid](
            x, values, places, x if outer is None else outer, x if bias is None else bias, partial,
            tokens, rows, features, blocks,
            x.stride(0), values.stride(0), places.stride(0), rows, tokens * rows, cuts.per_split,
            OUTER=0 if outer is None else outer.shape[1], HAS_BIAS=bias is not None, WIDE=interpreting(),
            ROWS=cuts.tile.rows, TOKENS=cuts.tile.tokens, WARPS=cuts.tile.warps, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
        )  # fmt: skip
        return add_up(partial, out) if add else partial


def covers(tokens: int, side: int) -> bool:
    """Say whether a tile for so many tokens has all its inputs and whole outer blocks of a side.

    Examples
    --------
    >>> covers(4096, 128), covers(1, 128)
    (True, False)
    """
    # As `cut` splits inputs where tokens are few.
    return tokens > 64 and tile_for(tokens).rows % side == 0
