"""Calls the Triton kernel of 2:4 weights: its tile, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from torch import Tensor

from recast.kernels.sparse_matmul.lanes import BLOCK
from recast.kernels.tiles import Tile, cut, interpreting, on_device

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
    from recast.kernels.quantized_matmul.launch import add_up
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
            x, values, places, x if bias is None else bias, partial,
            tokens, rows, features, blocks,
            x.stride(0), values.stride(0), places.stride(0), rows, tokens * rows, cuts.per_split,
            HAS_BIAS=bias is not None, WIDE=interpreting(), ROWS=cuts.tile.rows, TOKENS=cuts.tile.tokens,
            WARPS=cuts.tile.warps, num_warps=cuts.tile.warps, num_stages=cuts.tile.stages,
        )  # fmt: skip
        return add_up(partial, out)
