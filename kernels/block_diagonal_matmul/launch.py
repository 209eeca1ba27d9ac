"""Calls the Triton kernel of dense blocks on a diagonal: its tile, splits, and sums that are left to what follows.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recast.kernels.epilogue import launch as epilogues
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.tiles import Cut, Tile, cut, interpreting, on_device, precision_of

__all__ = ["DTYPES", "TILES", "block_tile", "constants", "finishing", "fitted", "launch", "step_of", "sums_as_loaded"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

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

# Products of float32 in three parts take the registers of three: on CUDA more than 32 tokens have this one, of twice the warps.
_MANY_FLOAT32 = Tile(64, 64, 8, 3)


def block_tile(tokens: int, backend: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """Return the tile for a number of tokens, on "cuda" or "hip" (default: what torch was built for).

    Examples
    --------
    >>> block_tile(1, "cuda").rows, block_tile(4096, "cuda").rows, block_tile(4096, "cuda", torch.float32).rows
    (32, 128, 64)
    """
    backend = backend or ("cuda" if torch.version.hip is None else "hip")
    if dtype == torch.float32 and backend == "cuda" and tokens > 32:
        return _MANY_FLOAT32
    return next(tile for most, tile in TILES[backend] if tokens <= most)


def fitted(tile: Tile, height: int) -> Tile:
    """Return a tile with no more rows than blocks of so many have, and the warps for them.

    Examples
    --------
    >>> fitted(Tile(128, 128, 8, 3), 50), fitted(Tile(32, 8, 2, 4), 3)
    (Tile(rows=64, tokens=128, warps=4, stages=3), Tile(rows=16, tokens=8, warps=1, stages=4))
    """
    rows = min(tile.rows, max(16, _power(height)))
    return Tile(rows, tile.tokens, max(1, tile.tokens // 32, tile.warps * rows // tile.rows), tile.stages)


def step_of(width: int, tile: Tile, summed: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return how many inputs of a block are taken at a time, fewer where they come in many sums: these share the memory.

    Examples
    --------
    >>> step_of(4096, block_tile(1, "cuda")), step_of(24, block_tile(1, "cuda"))
    (128, 32)
    >>> step_of(4096, block_tile(1, "cuda"), dtype=torch.float32)
    64
    """
    # Float32 in three parts takes registers for each step too.
    many = tile.tokens > (32 if dtype == torch.float32 else 64)
    most = (128 if many else 256) // dtype.itemsize
    if summed > 1:
        most = min(most, max(32, 4096 // (tile.tokens * _power(summed))))
    return min(most, max(16, _power(width)))


def constants(
    dtype: torch.dtype,
    tile: Tile,
    step: int,
    *,
    backend: str,
    summed: int = 1,
    orders: tuple[str, str] = ("as they are", "as they are"),
    runs: tuple[int, int] = (1, 1),
) -> dict[str, object]:
    """Return the kernel's constants but for the bias; orders and runs are those of inputs and outputs."""
    return {
        "SUMMED": summed,
        "IN": orders[0],
        "OUT": orders[1],
        "IN_RUN": runs[0],
        "OUT_RUN": runs[1],
        "PRECISION": precision_of(dtype, backend),
        "WIDE": interpreting(),
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "STEP": step,
    }


def finishing(epilogue: Epilogue) -> dict[str, object]:
    """Return the kernel's constants for what is done with sums; it knows no gates."""
    return {name: value for name, value in epilogues.constants(epilogue).items() if name != "GATED"}


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
    inputs: int | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    in_grid: Sequence[int] = (),
    out_grid: Sequence[int] = (),
    epilogue: Epilogue = NOTHING,
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
        (b, p, q) of any strides, but fastest where rows begin at multiples of 16. The last block may go beyond the n inputs and the
        rows.
    bias
        (rows,) or None.
    rows
        Outputs.
    inputs
        Of a block, where its columns are more: filled up with zeros, that is.
    gather, in_grid
        Where the blocks' inputs stand in x, as `reference.block_matmul` has it: an int32 index, or a grid, or as they are.
    scatter, out_grid
        Where their outputs stand in the result.
    epilogue
        What is done with sums before they are stored, unless they are the result; nothing that is gated.
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

    backend = "cuda" if torch.version.hip is None else "hip"
    tile = tile or block_tile(x.shape[-2], backend, blocks.dtype)
    if x.dim() == 3:
        if as_loaded is None:
            as_loaded = sums_as_loaded(x.shape[0], x.shape[1], tile, blocks.dtype)
        x = x if as_loaded else epilogues.add_up(x.contiguous(), torch.empty_like(x[0], dtype=blocks.dtype))
    sums = x if x.dim() == 3 else x.unsqueeze(0)
    summed, tokens, features = sums.shape
    count, height, columns = blocks.shape
    width = columns if inputs is None else inputs
    # Zeros that rows are filled up with are read with them; what a block has beyond the inputs is not.
    last_columns = columns if features >= count * width else features - (count - 1) * width
    out = x.new_empty((tokens, rows), dtype=blocks.dtype)
    if not out.numel():
        return out
    sums = sums if sums.stride(2) == 1 else sums.contiguous()
    tile = fitted(tile, height)
    step = step_of(columns, tile, summed, blocks.dtype)
    cuts = _cut(sums[0], count, height, max(1, -(-columns // step)), tile, splits)
    partial = cuts.partial(out)
    inside = epilogue if partial is out else NOTHING
    orders = _order(gather, in_grid), _order(scatter, out_grid)
    runs = _run(in_grid, width, orders[0]), _run(out_grid, height, orders[1])
    with on_device(x):
        block_matmul_kernel[cuts.grid](
            sums, blocks, _or(bias, x), _or(inside.factor, x), _or(inside.residual, x), _or(gather, x), _or(scatter, x), partial,
            tokens, rows, features, height, width, columns, last_columns, -(-height // tile.rows),
            *(in_grid or (1, 1, 1)), *(out_grid or (1, 1, 1)),
            sums.stride(1), sums.stride(0), *blocks.stride(), rows, tokens * rows, cuts.per_split,
            HAS_BIAS=bias is not None, **finishing(inside), num_warps=tile.warps, num_stages=tile.stages,
            **constants(blocks.dtype, tile, step, backend=backend, summed=summed, orders=orders, runs=runs),
        )  # fmt: skip
        return epilogues.add_up(partial, out, epilogue) if add else partial


def _cut(x: Tensor, count: int, height: int, steps: int, tile: Tile, splits: int | None) -> Cut:
    """As `cut`, with tiles that do not reach from one block into the next."""
    tiles = count * -(-height // tile.rows)
    return cut(x, tiles * tile.rows, steps, tile, splits)


def _power(count: int) -> int:
    """Return the next power of two."""
    return 1 << max(0, count - 1).bit_length()


def _order(index: Tensor | None, grid: Sequence[int]) -> str:
    return "index" if index is not None else "grid" if grid else "as they are"


def _run(grid: Sequence[int], size: int, order: str) -> int:
    """Features that are known to stand together: sixteen, where cells of a grid and blocks are whole numbers of them."""
    return 16 if order == "grid" and grid[2] % 16 == 0 and size % 16 == 0 else 1


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Stands for an operand that is not there; nothing reads it."""
    return other if tensor is None else tensor
