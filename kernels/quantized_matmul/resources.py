"""The configurations of the packed codes' kernel that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.epilogue import launch as epilogues
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.offline import TARGETS, Case
from recast.kernels.quantized_matmul.launch import WRITTEN_OUT, constants
from recast.kernels.tiles import TILES, Tile

__all__ = ["cases"]

# Bits, inputs of a group and kind: those of the forms' defaults.
CODES = (
    (4, 128, "integer"),
    (4, 32, "integer"),
    (2, 64, "integer"),
    (3, 128, "integer"),
    (8, 0, "integer"),
    (4, 64, "pairs"),
    (8, 0, "float"),
)
_POINTERS = (
    "x",
    "values",
    "high_values",
    "scale",
    "middle",
    "table",
    "sums",
    "left",
    "inner",
    "bias",
    "factor",
    "residual",
    "out",
)
_SIZES = ("tokens", "rows", "features", "groups", "blocks", "rank", "per_split")
_STRIDES = ("x", "sums", "values", "high", "scale", "left", "inner", "out")


def cases(target: str) -> Iterator[Case]:
    """Every tile with four bits, the tile for one token with every code, zero points, a low-rank term and epilogues."""
    tiles = TILES[TARGETS[target][0]]
    for _, tile in tiles:
        yield _case(4, 128, "integer", tile)
    one = tiles[0][1]
    for code in CODES[1:]:
        if code[2] != "float" or target != "sm_80":  # has no such numbers; a table of 256 serves there
            yield _case(*code, one)
    yield _case(4, 128, "integer", one, zeros=True)
    yield _case(4, 128, "integer", one, rank=64)
    for tile in (one, tiles[-1][1]):  # the latter has the fewest registers left
        yield _case(4, 128, "integer", tile, epilogue=Epilogue("silu", gated=True))
        yield _case(4, 128, "integer", tile, epilogue=Epilogue("gelu", residual=torch.empty(0)))
    for code in CODES:
        if code[2] != "float" or target != "sm_80":
            yield _written_out(*code)


def _written_out(bits: int, group: int, kind: str) -> Case:
    tile = WRITTEN_OUT
    types = dict.fromkeys(("values", "high_values", "table"), "*i32") | {
        "scale": "*fp32",
        "middle": "*fp32",
        "out": "*bf16",
    }
    aligned = (*types, "rows", "features", "values_stride", "high_stride", "scale_stride", "out_stride")
    sizes = ("rows", "features", "groups", "values_stride", "high_stride", "scale_stride", "out_stride")
    fixed = constants(bits, group, kind, torch.bfloat16, tile, zeros=False)
    for name in ("WIDE", "PRECISION", "TOKENS"):
        del fixed[name]
    return Case(
        kernel="recast.kernels.quantized_matmul.triton:write_out_kernel",
        name=f"{_said(bits, group, kind)}, written out",
        signature=types | dict.fromkeys(sizes, "i32"),
        constants=fixed | {"HAS_SCALE": True},
        aligned=aligned,
        num_warps=tile.warps,
        num_stages=tile.stages,
        multiplies=False,
    )


def _said(bits: int, group: int, kind: str) -> str:
    return {"pairs": f"nf{bits}", "float": "fp8"}.get(kind, f"int{bits}") + f" g{group}" * bool(group)


def _case(
    bits: int,
    group: int,
    kind: str,
    tile: Tile,
    *,
    zeros: bool = False,
    rank: int = 0,
    epilogue: Epilogue = NOTHING,
) -> Case:
    types = dict.fromkeys(_POINTERS, "*bf16") | dict.fromkeys(("values", "high_values"), "*i32")
    types |= dict.fromkeys(("scale", "middle", "sums"), "*fp32") | {"table": "*i32"}
    types |= dict.fromkeys(_SIZES, "i32") | {f"{name}_stride": "i32" for name in _STRIDES} | {"split_stride": "i64"}
    fixed = constants(bits, group, kind, torch.bfloat16, tile, zeros=zeros) | {"WIDE": False}
    aligned = (*_POINTERS, "rows", "features", "rank", *(f"{name}_stride" for name in _STRIDES if name != "sums"))
    name = _said(bits, group, kind) + " zeros" * zeros + f" + rank {rank}" * bool(rank) + epilogues.described(epilogue)
    return Case(
        kernel="recast.kernels.quantized_matmul.triton:dequantizing_matmul_kernel",
        name=f"{name}, {tile.tokens} tokens",
        signature=types,
        constants=fixed | {"HAS_SCALE": True, "HAS_BIAS": True, "RANK": rank} | epilogues.constants(epilogue),
        aligned=aligned,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # Weights that a thread decodes between two turns of the loop.
        weights=tile.rows * int(str(fixed["BLOCK"])) // (32 * tile.warps),
    )
