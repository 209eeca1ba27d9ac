"""Calls the Triton kernel of eight-bit products: tiles, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.reference import ROUNDED, Rounded
from recast.kernels.epilogue import launch as epilogues
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.tiles import Tile, cut, interpreting, on_device, tile_for

__all__ = ["launch", "piped", "step_of"]


def piped(tile: Tile) -> Tile:
    """Return the tile with loads under way while others are multiplied: both sides come through shared memory.

    Examples
    --------
    >>> piped(Tile(32, 8, 2)).stages
    4
    """
    return dataclasses.replace(tile, stages=4 if tile.tokens <= 64 else 3)


def step_of(tile: Tile) -> int:
    """Return how many inputs are taken at a time.

    Examples
    --------
    >>> step_of(Tile(32, 8, 2)), step_of(Tile(128, 128, 8))
    (256, 128)
    """
    return 256 if tile.tokens <= 16 else 128


def launch(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    rounded: Rounded = ROUNDED,
    bias: Tensor | None = None,
    epilogue: Epilogue = NOTHING,
    dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply vectors by a weight of the same format.

    Parameters
    ----------
    codes, weight
        (tokens, n) and (m, n), both int8 or both float8_e4m3fn.
    scale
        (m,) float32.
    rounded
        How vectors were rounded.
    bias
        (m,) or None.
    epilogue, dtype
        What is done with sums before they are stored, and in which dtype they are.
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, m), or half as many columns if rows are gated.
    """
    from recast.kernels.eight_bit_matmul.triton import eight_bit_matmul_kernel

    tokens, features = codes.shape
    rows = weight.shape[0]
    out = scale.new_empty((tokens, epilogue.outputs(rows)), dtype=dtype)
    if not out.numel():
        return out
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tile = piped(tile or tile_for(tokens))
    step = step_of(tile)
    cuts = cut(codes, rows, max(1, -(-features // step)), tile, splits)
    partial = cuts.partial(out, rows)
    inside = epilogue if partial is out else NOTHING
    optional = *rounded, bias, inside.factor, inside.residual
    integers, wide = codes.dtype == torch.int8, interpreting()
    if wide and not integers:
        codes, weight = codes.view(torch.uint8), weight.view(torch.uint8)
    with on_device(codes):
        eight_bit_matmul_kernel[cuts.grid](
            codes, weight, scale, *(scale if t is None else t for t in optional), partial, tokens, rows, features,
            codes.stride(0), weight.stride(0), partial.shape[-1], tokens * rows, cuts.per_split,
            HAS_STEP=rounded.step is not None, HAS_ZERO=rounded.zero is not None, HAS_BIAS=bias is not None,
            **epilogues.constants(inside), INTEGERS=integers, WIDE=wide,
            ROWS=tile.rows, TOKENS=tile.tokens, STEP=step, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return epilogues.add_up(partial, out, epilogue)
