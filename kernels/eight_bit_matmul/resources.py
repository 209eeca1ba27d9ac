"""The configurations of the eight-bit kernel that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.eight_bit_matmul.launch import piped, step_of
from recast.kernels.epilogue.launch import constants, described
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import TILES, Tile

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Every tile in int8, and in e4m3 where the matrix units take it (from sm_89 on; gfx942 has another format)."""
    tiles = [piped(tile) for _, tile in TILES[TARGETS[target][0]]]
    for kind in ("int8", "fp8") if target in ("sm_90", "sm_100") else ("int8",):
        for tile in tiles:
            yield _case(kind, tile)
    for tile in (tiles[0], tiles[-1]):
        yield _case("int8", tile, Epilogue("silu", gated=True))
        yield _case("int8", tile, Epilogue("gelu", residual=torch.empty(0)))


def _case(kind: str, tile: Tile, epilogue: Epilogue = NOTHING) -> Case:
    """As it is served: tokens have steps of their own, and integers a zero of their own."""
    number = "*i8" if kind == "int8" else "*fp8e4nv"
    types = {"x": number, "weight": number} | dict.fromkeys(("scale", "step", "zero", "offset"), "*fp32")
    types |= dict.fromkeys(("bias", "factor", "residual", "out"), "*bf16")
    sizes = ("tokens", "rows", "features", "x_stride", "weight_stride", "out_stride", "per_split")
    return Case(
        kernel="recast.kernels.eight_bit_matmul.triton:eight_bit_matmul_kernel",
        name=f"{kind} x {kind}{described(epilogue)}, {tile.tokens} tokens",
        signature=types | dict.fromkeys(sizes, "i32") | {"split_stride": "i64"},
        constants={
            "HAS_STEP": True,
            "HAS_ZERO": kind == "int8",
            "HAS_BIAS": True,
            "INTEGERS": kind == "int8",
            "WIDE": False,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "STEP": step_of(tile),
            **constants(epilogue),
        },
        aligned=(*types, "rows", "features", "x_stride", "weight_stride", "out_stride"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * step_of(tile) // (32 * tile.warps),
    )
