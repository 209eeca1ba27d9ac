"""The configurations of the kernels of gated inputs that are launched, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.gated_matmul.launch import FEW, ROWS, WARPS, inputs_of, warps_of
from recast.kernels.offline import Case

__all__ = ["cases"]

_FEATURES = 14336
_MODULE = "recast.kernels.gated_matmul.triton"


def cases(target: str) -> Iterator[Case]:
    """One to four vectors, by number (with norms) and by a threshold; the search for the cut among 14,336 inputs. In bfloat16."""
    numbers = {"x": "*bf16", "columns": "*bf16", "norms": "*fp32", "cuts": "*fp32", "bias": "*bf16", "out": "*fp32"}
    sizes = ("tokens", "rows", "features", "x_stride", "columns_stride", "per_split")
    for tokens in (1, 2, FEW):
        for counted in (True, False):
            yield Case(
                kernel=f"{_MODULE}:gated_matmul_kernel",
                name=f"gated by {'number' if counted else 'threshold'}, {tokens} tokens",
                signature=numbers | dict.fromkeys(sizes, "i32") | {"threshold": "fp32", "split_stride": "i64"},
                constants={
                    "WEIGHTED": counted,
                    "BY_COUNT": counted,
                    "HAS_BIAS": True,
                    "ROWS": ROWS,
                    "INPUTS": inputs_of(tokens),
                    "TOKENS": tokens,
                },
                aligned=(*numbers, "rows", "features", "x_stride", "columns_stride"),
                num_warps=WARPS,
                num_stages=1,
                weights=ROWS * inputs_of(tokens) // (32 * WARPS),
                multiplies=False,
            )
    yield Case(
        kernel=f"{_MODULE}:gate_cuts_kernel",
        name="the cut of 14,336 scores",
        signature={"x": "*bf16", "norms": "*fp32", "cuts": "*fp32"}
        | dict.fromkeys(("features", "kept", "x_stride"), "i32"),
        constants={"WEIGHTED": True, "FEATURES": 1 << (_FEATURES - 1).bit_length()},
        aligned=("x", "norms", "cuts", "features", "x_stride"),
        num_warps=warps_of(_FEATURES),
        num_stages=1,
        multiplies=False,
    )
