"""How the Triton kernels for few and many tokens are cut into blocks, and where they run."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TILES", "Tile", "interpreting", "on_device", "splits_for", "tile_for"]

# Blocks of a kernel that a processor should have, so that the loads of some wait while others multiply.
_WAVES = 4


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes
    ----------
    rows, tokens
        Outputs and vectors of a block of the kernel.
    warps, stages
        Of a block; loads that are under way at a time.
    """

    rows: int
    tokens: int
    warps: int
    stages: int = 1


# By the most tokens that they serve. Two warps keep the few tokens' product on the instructions of one warp, which need no
# shared memory for the weight. AMD's matrix units take no fewer than 16 vectors, and its blocks share less memory.
TILES = {
    "cuda": (
        (8, Tile(32, 8, 2)),
        (16, Tile(32, 16, 2)),
        (32, Tile(64, 32, 4)),
        (64, Tile(64, 64, 4)),
        (math.inf, Tile(128, 128, 8, 3)),
    ),
    "hip": (
        (16, Tile(32, 16, 2)),
        (64, Tile(64, 64, 4)),
        (math.inf, Tile(128, 128, 8)),
    ),
}


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, as its interpreter runs them."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def tile_for(tokens: int, backend: str | None = None) -> Tile:
    """Return the tile for a number of tokens, on "cuda" or "hip" (default: what torch was built for).

    Examples
    --------
    >>> tile_for(1, "cuda").tokens, tile_for(1, "hip").tokens, tile_for(4096, "cuda").tokens
    (8, 16, 128)
    """
    tiles = TILES[backend or ("cuda" if torch.version.hip is None else "hip")]
    return next(tile for most, tile in tiles if tokens <= most)


def splits_for(tiles: int, blocks: int, tokens: int, device: torch.device) -> int:
    """Cut the inputs where outputs alone would leave processors idle; partial sums cost memory, so for few tokens only.

    Parameters
    ----------
    tiles
        Blocks of the kernel without splits.
    blocks
        Pieces that the inputs come in.
    """
    if tokens > 64:
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(blocks // 4, processors * _WAVES // tiles, 16))


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the operands."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
