"""The configurations of the 2:4 kernel that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.offline import TARGETS, Case
from recast.kernels.sparse_matmul.lanes import BLOCK
from recast.kernels.tiles import TILES, Tile

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Every tile, and the one for many tokens with outer blocks; in bfloat16."""
    tiles = [tile for _, tile in TILES[TARGETS[target][0]]]
    for tile, outer in (*((tile, 0) for tile in tiles), (tiles[-1], 128)):
        yield _case(tile, outer)


def _case(tile: Tile, outer: int) -> Case:
    pointers = dict.fromkeys(("x", "outer", "bias", "out"), "*bf16") | dict.fromkeys(("values", "places"), "*i32")
    sizes = dict.fromkeys(("tokens", "rows", "features", "blocks", "per_split"), "i32")
    strides = dict.fromkeys(("x_stride", "values_stride", "places_stride", "out_stride"), "i32")
    return Case(
        kernel="recast.kernels.sparse_matmul.triton:sparse24_matmul_kernel",
        name="2:4" + f" and outer blocks of {outer}" * bool(outer) + f", {tile.tokens} tokens",
        signature=pointers | sizes | strides | {"split_stride": "i64"},
        constants={
            "OUTER": outer,
            "HAS_BIAS": True,
            "WIDE": False,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "WARPS": tile.warps,
        },
        aligned=(*pointers, *strides, "rows", "features"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * BLOCK // (32 * tile.warps),
    )
