"""Adds partial sums up and finishes them; and the constants by which a product's kernel does so itself.

Importing this file needs torch alone; calling `finish` needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from torch import Tensor

from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.tiles import on_device

__all__ = ["add_up", "constants", "described", "finish"]


def constants(epilogue: Epilogue) -> dict[str, object]:
    """Return what a kernel that finishes sums is compiled with.

    Examples
    --------
    >>> constants(Epilogue("silu", gated=True))
    {'ACTIVATION': 'silu', 'GATED': True, 'HAS_FACTOR': False, 'HAS_RESIDUAL': False}
    """
    return {
        "ACTIVATION": epilogue.activation,
        "GATED": epilogue.gated,
        "HAS_FACTOR": epilogue.factor is not None,
        "HAS_RESIDUAL": epilogue.residual is not None,
    }


def described(epilogue: Epilogue) -> str:
    """Say what follows a product, for tables.

    Examples
    --------
    >>> described(Epilogue("silu", gated=True)), described(NOTHING)
    (' + gate by silu', '')
    """
    named = (
        f" + gate by {epilogue.activation}"
        if epilogue.gated
        else f" + {epilogue.activation}" * bool(epilogue.activation)
    )
    return named + " + factor" * (epilogue.factor is not None) + " + residual" * (epilogue.residual is not None)


def finish(
    sums: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    *,
    step: Tensor | None = None,
    zero: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Add up and finish.

    Parameters
    ----------
    sums
        (tokens, rows), or partial sums (splits, tokens, rows); floating, contiguous.
    out
        (tokens, m), contiguous, to be filled.
    epilogue
        What is done with sums; m is ``epilogue.outputs(rows)``.
    step, zero, offset, bias
        Before that ``step (sums - zero offset) + bias``, with (tokens,) float32 twice, (rows,) float32 and (rows,); contiguous.

    Returns
    -------
    `out`.
    """
    from recast.kernels.epilogue.triton import finish_kernel

    count, splits = out.numel(), sums.shape[0] if sums.dim() == 3 else 1
    if count:
        operands = step, zero, offset, bias, epilogue.factor, epilogue.residual
        with on_device(sums):
            finish_kernel[(-(-count // 1024),)](
                sums, *(sums if operand is None else operand for operand in operands), out,
                count, splits, out.shape[1],
                HAS_STEP=step is not None, HAS_ZERO=zero is not None, HAS_BIAS=bias is not None, **constants(epilogue), BLOCK=1024,
            )  # fmt: skip
    return out


def add_up(partial: Tensor, out: Tensor, epilogue: Epilogue = NOTHING) -> Tensor:
    """Add up partial sums (splits, tokens, rows) into the result and finish them, unless they are the result."""
    return out if partial is out else finish(partial, out, epilogue)
