"""The configurations of the kernel that finishes sums, as `recast.kernels.offline` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from recast.kernels.offline import Case

__all__ = ["cases"]


def cases(target: str) -> Iterator[Case]:
    """Partial sums that are added up, with and without what is done with them."""
    for name, sums, activation, gated in (
        ("added up", "*fp32", "", False),
        ("finished: gelu, factor and residual", "*fp32", "gelu", False),
        ("finished: rounding undone, gated by silu", "*fp32", "silu", True),
    ):
        types = {"partial": sums} | dict.fromkeys(("step", "zero", "offset"), "*fp32")
        types |= {"bias": "*bf16", "factor": "*bf16", "residual": "*bf16", "out": "*bf16"}
        yield Case(
            kernel="recast.kernels.epilogue.triton:finish_kernel",
            name=name,
            signature=types | dict.fromkeys(("count", "splits", "columns"), "i32"),
            constants={
                **dict.fromkeys(("HAS_STEP", "HAS_ZERO", "HAS_BIAS"), gated),
                "ACTIVATION": activation,
                "GATED": gated,
                "HAS_FACTOR": bool(activation) and not gated,
                "HAS_RESIDUAL": bool(activation) and not gated,
                "BLOCK": 1024,
            },
            aligned=(*types, "count", "columns"),
            num_warps=4,
            num_stages=3,
            multiplies=False,
        )
