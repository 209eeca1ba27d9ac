"""The configurations of the kernel for values at any places that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recast.kernels.offline import TARGETS, Case
from recast.kernels.tiles import Tile, precision_of, tile_for
from recast.kernels.unstructured_matmul.lanes import BLOCK
from recast.kernels.unstructured_matmul.launch import MOST_TOKENS, WRITTEN_OUT

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Every tile in bfloat16 and float32, and the weight written out."""
    backend = TARGETS[target][0]
    for dtype in (torch.bfloat16, torch.float32):
        for tile in dict.fromkeys(
            tile_for(tokens, backend) for tokens in (8, 16, 32, 64) if tokens <= MOST_TOKENS[dtype]
        ):
            yield _case(tile, dtype, backend)
    pointers, sizes = _operands("*bf16")
    yield Case(
        kernel="recast.kernels.unstructured_matmul.triton:write_out_kernel",
        name="any places, written out",
        signature=pointers | {"out": "*bf16"} | sizes,
        constants={"ROWS": WRITTEN_OUT.rows, "WARPS": WRITTEN_OUT.warps},
        aligned=(*pointers, "out", "rows", "features"),
        num_warps=WRITTEN_OUT.warps,
        num_stages=1,
        multiplies=False,
    )


def _operands(number: str) -> tuple[dict[str, str], dict[str, str]]:
    """Pointers and sizes that both kernels take."""
    pointers = {"values": number} | dict.fromkeys(("words", "starts", "offsets"), "*i32")
    return pointers, dict.fromkeys(("rows", "features", "units", "blocks"), "i32")


def _case(tile: Tile, dtype: torch.dtype, backend: str) -> Case:
    number = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    pointers, sizes = _operands(number)
    pointers |= dict.fromkeys(("x", "bias", "out"), number)
    sizes |= dict.fromkeys(("tokens", "x_stride", "per_split"), "i32") | {"split_stride": "i64"}
    return Case(
        kernel="recast.kernels.unstructured_matmul.triton:unstructured_matmul_kernel",
        name=f"any places{' in float32' * (dtype == torch.float32)}, {tile.tokens} tokens",
        signature=pointers | sizes,
        constants={
            "HAS_BIAS": True,
            "WIDE": False,
            "PRECISION": precision_of(dtype, backend),
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "WARPS": tile.warps,
        },
        aligned=(*pointers, "x_stride", "rows", "features"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        weights=tile.rows * BLOCK // (32 * tile.warps),
    )
