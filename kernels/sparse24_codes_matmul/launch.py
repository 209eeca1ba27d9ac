"""Calls the Triton kernel of 2:4 codes: its tile, the sums that its codes' middle needs, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.kernels.epilogue.launch import add_up
from recast.kernels.quantized_matmul.launch import middle_of, sums_of
from recast.kernels.sparse24_codes_matmul.lanes import block_of
from recast.kernels.tiles import Tile, cut, interpreting, on_device, precision_of, tile_for

__all__ = ["constants", "launch", "steps_of", "tile_of"]


def steps_of(bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return how many sixteens of inputs are summed before they are scaled.

    Raises
    ------
    ValueError
        A group of inputs (0 for all of a row) is no number of sixteens.

    Examples
    --------
    >>> steps_of(4, 256), steps_of(4, 64), steps_of(8, 0), steps_of(4, 256, torch.float32)
    (16, 4, 8, 2)
    """
    if group % 16:
        raise ValueError(f"the kernel scales sums of 16 inputs: groups of {group} inputs do not divide so; 64 would")
    step = (math.gcd(group, block_of(bits)) if group else block_of(bits)) // 16
    # Pieces of a product are joined two by two. One of float32 takes three operands of each, so few at a time.
    return min(step & -step, 2 if dtype == torch.float32 else 16)


def tile_of(tokens: int, step: int, backend: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """Return the tile for a number of tokens and of sixteens that are multiplied at a time; backends as for `tile_for`.

    Examples
    --------
    >>> tile_of(1, 16, "cuda") == tile_for(1, "cuda"), tile_of(4096, 16, "cuda").tokens, tile_of(4096, 2, "cuda").tokens
    (True, 64, 32)
    """
    backend = backend or ("cuda" if torch.version.hip is None else "hip")
    if dtype == torch.float32:
        return tile_for(8 if tokens <= 8 else 32, backend)
    # A product of its own for every few inputs, or of 128 vectors, is more than the registers hold.
    if step < 8:
        return tile_for(min(tokens, 32), backend)
    return Tile(128, 64, 8, 3) if backend == "cuda" and tokens > 64 else tile_for(tokens, backend)


def constants(
    bits: int, group: int, kind: str, dtype: torch.dtype, tile: Tile, backend: str | None = None
) -> dict[str, object]:
    """Return the kernel's constants but for those that say which operands it has."""
    middle = middle_of(bits, kind, dtype) + 2 ** (bits - 1) if kind == "integer" and bits < 8 else 0.0
    return {
        "BITS": bits,
        "STEP": steps_of(bits, group, dtype),
        "GROUP": group,
        "KIND": kind,
        "MIDDLE": middle,
        "PRECISION": precision_of(dtype, backend),
        "WIDE": interpreting(),
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "WARPS": tile.warps,
    }


def launch(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    scale: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group: int,
    kind: str,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply vectors by 2:4 codes in lane order.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    values, places
        As `lanes.to_lanes` gives them: int32 (m, words).
    scale
        (groups, m), contiguous, or None.
    table
        (2^bits,) for kind "table", its first entry zero; `pairs_of` such a one, in x's dtype, for kind "pairs".
    bias
        (m,) or None.
    bits, group, kind
        4 or 8; inputs in a group (twice its values), a multiple of 16, 0 for all; "integer", "table" or "pairs".
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    from recast.kernels.sparse24_codes_matmul.triton import sparse24_codes_matmul_kernel

    tokens, features = x.shape
    rows = values.shape[0]
    out = x.new_empty((tokens, rows))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = -(-features // block_of(bits))
    cuts = cut(x, rows, blocks, tile or tile_of(tokens, steps_of(bits, group, x.dtype), dtype=x.dtype), splits)
    fixed = constants(bits, group, kind, x.dtype, cuts.tile)
    width = steps_of(bits, group, x.dtype) * 16
    sums = sums_of(x, width, blocks * block_of(bits) // width) if fixed["MIDDLE"] else x
    partial = cuts.partial(out)
    with on_device(x):
        sparse24_codes_matmul_kernel[cuts.grid](
            x, sums, values, places, x if scale is None else scale, x if table is None else table,
            x if bias is None else bias, partial,
            tokens, rows, features, 1 if scale is None else scale.shape[0], blocks,
            x.stride(0), tokens, values.stride(0), places.stride(0), rows, rows, tokens * rows, cuts.per_split,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
            num_warps=cuts.tile.warps, num_stages=cuts.tile.stages, **fixed,
        )  # fmt: skip
        return add_up(partial, out)
