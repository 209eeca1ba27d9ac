"""The configurations of the 2:4 kernel that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.offline import TARGETS, Case
from recast.kernels.sparse_matmul.lanes import BLOCK
from recast.kernels.tiles import TILES

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Every tile, in bfloat16."""
    pointers = {"x": "*bf16", "values": "*i32", "places": "*i32", "bias": "*bf16", "out": "*bf16"}
    sizes = dict.fromkeys(("tokens", "rows", "features", "blocks", "per_split"), "i32")
    strides = dict.fromkeys(("x_stride", "values_stride", "places_stride", "out_stride"), "i32")
    for _, tile in TILES[TARGETS[target][0]]:
        yield Case(
            kernel="recast.kernels.sparse_matmul.triton:sparse24_matmul_kernel",
            name=f"2:4, {tile.tokens} tokens",
            signature=pointers | sizes | strides | {"split_stride": "i64"},
            constants={
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
