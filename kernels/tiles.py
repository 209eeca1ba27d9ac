"""How the Triton kernels for few and many tokens are cut into blocks, and where they run."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TILES", "Cut", "Tile", "cut", "interpreting", "on_device", "precision_of", "tile_for"]

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


def precision_of(dtype: torch.dtype, backend: str | None = None) -> str:
    """Return how `tl.dot` is to multiply; of consequence for float32 alone.

    Products of float32 are as exact as float32 unless torch's are allowed not to be: in three parts on NVIDIA's matrix units,
    which take 10 bits, at once on AMD's, which take all.

    Examples
    --------
    >>> precision_of(torch.float32, "cuda"), precision_of(torch.float32, "hip")
    ('tf32x3', 'ieee')
    """
    backend = backend or ("cuda" if torch.version.hip is None else "hip")
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if backend == "hip" else "tf32x3" if exact else "tf32"


def tile_for(tokens: int, backend: str | None = None) -> Tile:
    """Return the tile for a number of tokens, on "cuda" or "hip" (default: what torch was built for).

    Examples
    --------
    >>> tile_for(1, "cuda").tokens, tile_for(1, "hip").tokens, tile_for(4096, "cuda").tokens
    (8, 16, 128)
    """
    tiles = TILES[backend or ("cuda" if torch.version.hip is None else "hip")]
    return next(tile for most, tile in tiles if tokens <= most)


@dataclass(frozen=True)
class Cut:
    """Blocks of a kernel that multiplies.

    Attributes
    ----------
    tile
        Outputs and vectors of each.
    splits, per_split
        Into how many sums the inputs are cut, and pieces of the inputs in each.
    grid
        Blocks over outputs, vectors and splits.
    """

    tile: Tile
    splits: int
    per_split: int
    grid: tuple[int, int, int]

    def partial(self, out: Tensor, rows: int | None = None) -> Tensor:
        """Where sums go: the result (tokens, outputs) itself, or float32 (splits, tokens, rows), by default as many as outputs."""
        shape = self.splits, out.shape[0], out.shape[1] if rows is None else rows
        return out if self.splits == 1 else out.new_empty(shape, dtype=torch.float32)


def cut(x: Tensor, rows: int, pieces: int, tile: Tile | None = None, splits: int | None = None) -> Cut:
    """Cut the product of vectors (tokens, n) with a weight of so many rows, whose inputs come in so many pieces.

    Inputs are split where outputs alone would leave processors idle; partial sums cost memory, so for few tokens only.
    """
    tokens = x.shape[0]
    tile = tile or tile_for(tokens)
    over = -(-rows // tile.rows), -(-tokens // tile.tokens)
    if splits is None:
        cuda = x.device.type == "cuda"
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 4
        splits = 1 if tokens > 64 else max(1, min(pieces // 4, processors * _WAVES // (over[0] * over[1]), 16))
    per_split = -(-pieces // splits)
    return Cut(tile, -(-pieces // per_split), per_split, (*over, -(-pieces // per_split)))


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the operands."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
