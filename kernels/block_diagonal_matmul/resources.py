"""The configurations of the kernel of dense blocks that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.block_diagonal_matmul.launch import TILES, step_of
from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import Tile

__all__ = ["cases"]

_STRIDES = ("x", "x_split", "block", "row", "out")


def cases(target: str) -> Iterator[Case]:
    """Both products of low rank for few tokens, with sums and without; blocks of 128 for any number of tokens; in bfloat16."""
    tiles = [tile for _, tile in TILES[TARGETS[target][0]]]
    for tile in tiles[:-1]:
        yield _case(f"low rank, first product, {tile.tokens} tokens", tile, 512)
    yield _case(f"low rank, second product of 8 sums, {tiles[0].tokens} tokens", tiles[0], 512, summed=8)
    yield _case(f"low rank, gradient of x, {tiles[0].tokens} tokens", tiles[0], 512, transposed=True)
    for tile in tiles:
        yield _case(f"blocks of 128, {tile.tokens} tokens", tile, 128)
    yield _case(f"blocks of 128 of 16 sums, {tiles[0].tokens} tokens", tiles[0], 128, summed=16)


def _case(name: str, tile: Tile, width: int, *, summed: int = 1, transposed: bool = False) -> Case:
    pointers = {"x": "*fp32" if summed > 1 else "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16"}
    sizes = ("tokens", "rows", "features", "height", "width", "tiles", "per_split")
    strides = tuple(f"{stride}_stride" for stride in (*_STRIDES, "column"))
    fixed = "row_stride" if transposed else "column_stride"
    signature = pointers | dict.fromkeys((*sizes, *strides), "i32") | {"split_stride": "i64", "x_split_stride": "i64"}
    del signature[fixed]
    step = step_of(width, tile, summed)
    return Case(
        kernel="recast.kernels.block_diagonal_matmul.triton:block_matmul_kernel",
        name=name,
        signature=signature,
        constants={
            fixed: 1,
            "SUMMED": summed,
            "HAS_BIAS": True,
            "WIDE": False,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "STEP": step,
        },
        aligned=(*pointers, *(name for name in strides if name != fixed), "rows", "features", "height", "width"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * step // (32 * tile.warps),
    )
