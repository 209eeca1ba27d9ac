"""A 2:4 matrix between two block-diagonal ones, ``y = A C B x + bias``: what is fused, and why the rest is not.

For t tokens, a core (m, n) and blocks of side d in 16 bits: C is ``9/8 m n`` bytes, A and B are ``2 d m`` and ``2 d n``; at
m = n = 4096, d = 128 that is 18.9 MB and 1.05 MB each, 4.4 microseconds of an H200's memory in all.

- *B before C.* In the core's prologue each of its ``m / 32`` tiles of rows would multiply x by all of B: at m = 4096 134 MB of the
  cache for 21 MB of the memory. A small kernel writes ``2 t n`` bytes instead, 8 KB a token, and is done once.
- *A after C, few tokens.* A tile of whole blocks has 128 rows: 32 tiles for 132 processors. Split over the inputs instead, each
  split would read A and multiply by it, for A (sum of splits) is not known before all have ended. Their sums have to be added up
  by some launch in any case: the kernel of A does it while it loads them, where that is fewer bytes (see `block_diagonal_matmul`).
- *A after C, many tokens.* Inputs are not split and a tile has 128 rows: A's block is multiplied with the tile before it is
  written, which spares the ``4 t m`` bytes of writing C's outputs and reading them again, and a launch.

So few tokens take three launches (four, where sums are many), many tokens two.
"""

from __future__ import annotations

from torch import Tensor

from recast.kernels.block_diagonal_matmul.launch import launch as launch_blocks
from recast.kernels.sparse_matmul.launch import covers
from recast.kernels.sparse_matmul.launch import launch as launch_core
from recast.kernels.tiles import Tile

__all__ = ["launch"]


def launch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Multiply vectors by a 2:4 core in lane order between blocks on diagonals.

    Parameters
    ----------
    x
        (tokens, n), float16 or bfloat16: the dtype of everything else.
    values, places
        int32 (m, words), as `sparse_matmul.lanes.to_lanes` gives them.
    left, right
        (⌈m / d⌉, d, d) and (⌈n / e⌉, e, e), contiguous.
    bias
        (m,) or None.
    tile, splits
        Of the core; chosen by the number of tokens and the device if not given.
    fused
        Whether the core's kernel multiplies by `left`; chosen by its tile if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    tokens, features = x.shape
    rows = values.shape[0]
    inner = launch_blocks(x, right, None, features)
    if fused is None:
        fused = tile is None and covers(tokens, left.shape[1])
    if fused:
        return launch_core(inner, values, places, bias, outer=left, tile=tile, splits=1)
    sums = launch_core(inner, values, places, None, tile=tile, splits=splits, add=False)
    return launch_blocks(sums, left, bias, rows)
