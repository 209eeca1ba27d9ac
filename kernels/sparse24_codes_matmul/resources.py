"""The configurations of the kernel of 2:4 codes that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.offline import TARGETS, Case
from recast.kernels.sparse24_codes_matmul.lanes import block_of
from recast.kernels.sparse24_codes_matmul.launch import constants, steps_of, tile_of

__all__ = ["cases"]

_POINTERS = ("x", "sums", "values", "places", "scale", "table", "bias", "out")
_SIZES = ("tokens", "rows", "features", "groups", "blocks", "per_split")
_STRIDES = ("x", "sums", "values", "places", "scale", "out")


def cases(target: str) -> Iterator[Case]:
    """Every tile with four bits, the tile for one token with eight and with a table; in bfloat16."""
    backend = TARGETS[target][0]
    for tokens in (8, 16, 32, 64, 128) if backend == "cuda" else (16, 64, 128):
        yield _case(4, 128, "integer", tokens, backend)
    yield _case(4, 32, "integer", 128, backend)
    for bits, group, kind in ((8, 0, "integer"), (4, 64, "pairs")):
        yield _case(bits, group, kind, 8 if backend == "cuda" else 16, backend)


def _case(bits: int, group: int, kind: str, tokens: int, backend: str) -> Case:
    # Groups are counted in values, the kernel's in inputs.
    tile = tile_of(tokens, steps_of(bits, 2 * group), backend)
    types = dict.fromkeys(_POINTERS, "*bf16") | dict.fromkeys(("values", "places"), "*i32")
    types |= dict.fromkeys(("scale", "sums"), "*fp32") | {"table": "*i32"}
    types |= dict.fromkeys(_SIZES, "i32") | {f"{name}_stride": "i32" for name in _STRIDES} | {"split_stride": "i64"}
    name = ("nf4" if kind == "pairs" else f"int{bits}") + f" g{group}" * bool(group)
    return Case(
        kernel="recast.kernels.sparse24_codes_matmul.triton:sparse24_codes_matmul_kernel",
        name=f"2:4 of {name}, {tokens} tokens",
        signature=types,
        constants=constants(bits, 2 * group, kind, torch.bfloat16, tile, backend)
        | {"WIDE": False, "HAS_SCALE": True, "HAS_BIAS": True},
        aligned=(*_POINTERS, "rows", "features", *(f"{name}_stride" for name in _STRIDES if name != "sums")),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * block_of(bits) // (32 * tile.warps),
    )
