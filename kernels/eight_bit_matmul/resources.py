"""The configurations of the eight-bit kernel that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.eight_bit_matmul.launch import piped, step_of
from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import TILES

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Every tile in int8, and in e4m3 where the matrix units take it (from sm_89 on; gfx942 has another format)."""
    for kind in ("int8", "fp8") if target in ("sm_90", "sm_100") else ("int8",):
        for _, plain in TILES[TARGETS[target][0]]:
            tile, number = piped(plain), "*i8" if kind == "int8" else "*fp8e4nv"
            types = {"x": number, "weight": number, "scale": "*fp32", "out": "*fp32"}
            sizes = ("tokens", "rows", "features", "x_stride", "weight_stride", "out_stride", "per_split")
            yield Case(
                kernel="recast.kernels.eight_bit_matmul.triton:eight_bit_matmul_kernel",
                name=f"{kind} x {kind}, {tile.tokens} tokens",
                signature=types | dict.fromkeys(sizes, "i32") | {"split_stride": "i64"},
                constants={
                    "INTEGERS": kind == "int8",
                    "WIDE": False,
                    "ROWS": tile.rows,
                    "TOKENS": tile.tokens,
                    "STEP": step_of(tile),
                },
                aligned=(*types, "rows", "features", "x_stride", "weight_stride", "out_stride"),
                num_warps=tile.warps,
                num_stages=tile.stages,
                weights=tile.rows * step_of(tile) // (32 * tile.warps),
            )
