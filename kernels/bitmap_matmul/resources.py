"""The configurations of the kernels of bitmap weights that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.bitmap_matmul.launch import TILES, WRITTEN_OUT, constants
from recast.kernels.bitmap_matmul.reference import STEP
from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import Tile

__all__ = ["cases"]

_MODULE = "recast.kernels.bitmap_matmul.triton"
_STRIDES = ("words_stride", "starts_stride", "out_stride")


def cases(target: str) -> Iterator[Case]:
    """Every tile in bfloat16, that of one token in float32, and writing out."""
    tiles = [tile for _, tile in TILES[TARGETS[target][0]]]
    for tile in tiles:
        yield _case(target, tile, torch.bfloat16)
    yield _case(target, tiles[0], torch.float32)
    pointers = {"values": "*i16", "words": "*i32", "starts": "*i32", "out": "*bf16"}
    sizes = ("rows", "features", "quads", *_STRIDES)
    yield Case(
        kernel=f"{_MODULE}:write_out_kernel",
        name="bitmap written out",
        signature=pointers | dict.fromkeys(sizes, "i32"),
        constants={"STEP": STEP, "WIDE": False, "ROWS": WRITTEN_OUT.rows, "WARPS": WRITTEN_OUT.warps},
        aligned=(*pointers, "rows", "features", "words_stride", "out_stride"),
        num_warps=WRITTEN_OUT.warps,
        num_stages=WRITTEN_OUT.stages,
        multiplies=False,
    )


def _case(target: str, tile: Tile, dtype: torch.dtype) -> Case:
    number, value = {torch.bfloat16: ("*bf16", "*i16"), torch.float32: ("*fp32", "*fp32")}[dtype]
    pointers = dict.fromkeys(("x", "bias", "out"), number) | {"values": value, "words": "*i32", "starts": "*i32"}
    sizes = ("tokens", "rows", "features", "quads", "steps", "x_stride", "per_split", *_STRIDES)
    return Case(
        kernel=f"{_MODULE}:bitmap_matmul_kernel",
        name=f"bitmap{' in float32' if dtype == torch.float32 else ''}, {tile.tokens} tokens",
        signature=pointers | dict.fromkeys(sizes, "i32") | {"split_stride": "i64"},
        constants=constants(dtype, tile, TARGETS[target][0]) | {"HAS_BIAS": True, "WIDE": False},
        aligned=(*pointers, "rows", "features", "x_stride", "words_stride", "out_stride"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * STEP // (32 * tile.warps),
    )
