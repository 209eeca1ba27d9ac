"""A weight of low rank times few vectors in two launches, whose intermediate is partial sums that stay in the cache.

For t tokens, rank r and a weight (m, n) the factors are ``2 r (m + n)`` bytes in 16 bits; both are read once, whatever is done.

- *One launch* in which every block multiplies x by all of the right factor reads that factor once for each tile of 32 outputs:
  ``m / 32`` times, 128 for m = 4096. A barrier across the grid would need all blocks resident; it saves a launch and no byte.
- *Two launches.* The first has only ``r / 32`` tiles of outputs, so its inputs are split in S sums, float32 (S, t, r). Added up by a
  launch of their own they cost ``4 S t r`` bytes written and read and a third start. Added up by the second launch as it loads them
  they cost ``4 S t r`` bytes of the cache for each of its tiles, beside the 64 r bytes of the left factor that the tile reads from
  memory: no more than these while ``S t <= 16`` (float32 vectors: 32).

So sums are added up by the second launch up to there, and by a launch of their own beyond: one token with eight splits takes two
launches, eight tokens three. At m = n = 4096, r = 512 and one token the factors are 8.4 MB, 1.75 microseconds of an H200's memory;
the sums are 16 KB and, read by 128 tiles, 2.1 MB of its cache. With many tokens both products are bound by multiplication, and the
intermediate's ``4 t r`` bytes are small beside ``2 t (m + n)`` of vectors: `low_rank_op` calls the library's products then.
"""

from __future__ import annotations

from torch import Tensor

from recast.kernels.block_diagonal_matmul.launch import launch as launch_blocks
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.tiles import Tile

__all__ = ["launch"]


def launch(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    *,
    epilogue: Epilogue = NOTHING,
    tile: Tile | None = None,
    splits: int | None = None,
    as_loaded: bool | None = None,
) -> Tensor:
    """Multiply vectors by two factors.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    left, right
        (m, rank) and (rank, n) in x's dtype, of any strides: transposed factors serve gradients.
    bias
        (m,) or None.
    epilogue
        What is done with the result before it is stored; nothing that is gated.
    tile, splits
        Of the first product; chosen by the number of tokens and the device if not given.
    as_loaded
        Whether the second product adds the first one's sums up; chosen by the bytes if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    inner = launch_blocks(x, right.unsqueeze(0), None, right.shape[0], tile=tile, splits=splits, add=False)
    return launch_blocks(
        inner, left.unsqueeze(0), bias, left.shape[0], epilogue=epilogue, tile=tile, splits=1, as_loaded=as_loaded
    )
