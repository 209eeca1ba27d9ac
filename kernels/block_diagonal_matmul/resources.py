"""The configurations of the kernel of dense blocks that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.block_diagonal_matmul.launch import TILES, block_tile, constants, finishing, fitted, step_of
from recast.kernels.epilogue.launch import described
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import Tile

__all__ = ["cases"]

_AS_THEY_ARE = ("as they are", "as they are")
_SIZES = ("tokens", "rows", "features", "height", "width", "columns", "last_columns", "tiles", "per_split")
_GRIDS = tuple(f"{side}_{name}" for side in ("in", "out") for name in ("rows", "columns", "width"))
_STRIDES = tuple(f"{name}_stride" for name in ("x", "x_split", "block", "row", "column", "out"))


def cases(target: str) -> Iterator[Case]:
    """Every tile in bfloat16 and float32; sums, orders, blocks turned over and small ones for the tiles that they matter to."""
    backend = TARGETS[target][0]
    tiles = [tile for _, tile in TILES[backend]]
    few, many = tiles[0], tiles[-1]
    for tile in tiles[:-1]:
        yield _case(target, "low rank, first product", tile, 512)
    yield _case(target, "low rank, second product of 8 sums", few, 512, summed=8)
    yield _case(target, "low rank, second product", few, 512, epilogue=Epilogue("gelu", residual=torch.empty(0)))
    yield _case(target, "low rank, gradient of x", few, 512, transposed=True)
    for tile in tiles:
        yield _case(target, "blocks of 128", tile, 128)
    yield _case(target, "blocks of 128 of 16 sums", few, 128, summed=16)
    for tile in (few, many):
        yield _case(target, "blocks to a shuffle", tile, 1024, orders=("as they are", "grid"))
        yield _case(target, "blocks from a shuffle", tile, 1024, orders=("grid", "as they are"))
        yield _case(target, "blocks between permutations", tile, 1024, orders=("index", "index"))
    yield _case(target, "blocks, gradient of x", many, 1024, transposed=True)
    # The tile of the smallest blocks has 16 rows and 16 inputs; with few tokens it is no 16 bytes for every thread.
    yield _case(target, "blocks of 32", fitted(few, 32), 32)
    yield _case(target, "blocks of 16", fitted(many, 16), 16)
    for tile in dict.fromkeys(block_tile(tokens, backend, torch.float32) for tokens in (8, 16, 32, 64, 128)):
        yield _case(target, "blocks in float32", tile, 1024, dtype=torch.float32)


def _case(
    target: str,
    name: str,
    tile: Tile,
    width: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    summed: int = 1,
    orders: tuple[str, str] = _AS_THEY_ARE,
    transposed: bool = False,
    epilogue: Epilogue = NOTHING,
) -> Case:
    number = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    pointers = dict.fromkeys(("x", "weight", "bias", "factor", "residual", "gather", "scatter", "out"), number)
    pointers |= {"x": "*fp32" if summed > 1 else number} | dict.fromkeys(("gather", "scatter"), "*i32")
    fixed = "row_stride" if transposed else "column_stride"
    signature = pointers | dict.fromkeys((*_SIZES, *_GRIDS, *_STRIDES), "i32")
    signature |= {"split_stride": "i64", "x_split_stride": "i64"}
    del signature[fixed]
    step = step_of(width, tile, summed, dtype)
    runs = (16 if orders[0] == "grid" else 1, 16 if orders[1] == "grid" else 1)
    known = constants(dtype, tile, step, backend=TARGETS[target][0], summed=summed, orders=orders, runs=runs)
    whole = ("rows", "features", "height", "width", "columns", "last_columns", "in_width", "out_width", *_STRIDES)
    return Case(
        kernel="recast.kernels.block_diagonal_matmul.triton:block_matmul_kernel",
        name=f"{name}{described(epilogue)}, {tile.tokens} tokens",
        signature=signature,
        constants=known | {fixed: 1, "HAS_BIAS": True, "WIDE": False} | finishing(epilogue),
        aligned=(*pointers, *(name for name in whole if name != fixed)),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * step // (32 * tile.warps),
    )
