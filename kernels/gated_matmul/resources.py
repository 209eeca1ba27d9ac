"""The configurations of the kernels of gated inputs that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.gated_matmul.launch import FEW, INPUTS, ROWS, power_of_2, warps_of
from recast.kernels.offline import Case

__all__ = ["cases"]

_FEATURES = 14336
_MODULE = "recast.kernels.gated_matmul.triton"


def cases(target: str) -> Iterator[Case]:
    """Columns for one to four vectors, and the search for the cut among 14,336 scores; in bfloat16."""
    numbers = dict.fromkeys(("x", "columns", "bias", "out"), "*bf16")
    sizes = ("tokens", "rows", "features", "x_stride", "columns_stride", "per_split")
    for tokens in (1, 2, FEW):
        yield Case(
            kernel=f"{_MODULE}:columns_matmul_kernel",
            name=f"columns, {tokens} tokens",
            signature=numbers | dict.fromkeys(sizes, "i32") | {"split_stride": "i64"},
            constants={"HAS_BIAS": True, "ROWS": ROWS, "INPUTS": INPUTS, "TOKENS": tokens},
            aligned=(*numbers, "rows", "features", "x_stride", "columns_stride"),
            num_warps=1,
            num_stages=1,
            weights=ROWS * INPUTS // 32,
            multiplies=False,
        )
    yield Case(
        kernel=f"{_MODULE}:gate_cuts_kernel",
        name="the cut of 14,336 scores",
        signature={"x": "*bf16", "norms": "*fp32", "cuts": "*fp32"}
        | dict.fromkeys(("features", "kept", "x_stride"), "i32"),
        constants={"WEIGHTED": True, "FEATURES": power_of_2(_FEATURES)},
        aligned=("x", "norms", "cuts", "features", "x_stride"),
        num_warps=warps_of(_FEATURES),
        num_stages=1,
        multiplies=False,
    )
