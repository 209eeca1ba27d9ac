"""Calls the Triton kernels of gated inputs: the cut where inputs are kept by number, then the columns that are wanted.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.tiles import on_device

__all__ = ["FEW", "LARGEST", "ROWS", "WARPS", "inputs_of", "launch", "warps_of"]

# Vectors that are multiplied at a time: of four that keep half of their inputs each, 94 % of the columns are wanted.
FEW = 4
# Inputs among which the largest are found at once: as many numbers as the registers of one block hold.
LARGEST = 1 << 15
ROWS, WARPS = 128, 4
# Blocks that a processor should have: what hides the wait for masked loads, which do not run ahead of their masks.
_BLOCKS = 8


def inputs_of(tokens: int) -> int:
    """Return how many columns a block loads at a time: two loads of 16 bytes for each thread, four for one vector."""
    return 32 if tokens == 1 else 16


def warps_of(features: int) -> int:
    """Return the warps that find the largest of so many inputs, 32 or fewer in each thread."""
    return max(4, min(32, features // 1024))


def launch(
    x: Tensor,
    columns: Tensor,
    norms: Tensor | None,
    kept: int,
    threshold: float | None,
    bias: Tensor | None,
    *,
    splits: int | None = None,
) -> Tensor:
    """Multiply up to `FEW` vectors by the columns that their gates let through.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    columns
        (n, m), contiguous along m, in x's dtype.
    norms
        float32 (n,) or None.
    kept, threshold
        As `reference.keeps` takes them; without a threshold n is at most `LARGEST`.
    bias
        (m,) or None.
    splits
        Into how many sums the inputs are cut; chosen by the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    import triton

    from recast.kernels.gated_matmul.triton import gate_cuts_kernel, gated_matmul_kernel
    from recast.kernels.quantized_matmul.launch import add_up

    (tokens, features), rows = x.shape, columns.shape[1]
    out = x.new_empty((tokens, rows))
    x = x if x.stride(1) == 1 else x.contiguous()
    size = triton.next_power_of_2(tokens)
    inputs = inputs_of(size)
    tiles, pieces = -(-rows // ROWS), -(-features // inputs)
    if splits is None:
        cuda = x.device.type == "cuda"
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 1
        splits = max(1, min(pieces, processors * _BLOCKS // tiles, 32))
    per_split = -(-pieces // splits)
    splits = -(-pieces // per_split)
    partial = out if splits == 1 else out.new_empty((splits, tokens, rows), dtype=torch.float32)
    cuts = x.new_empty((tokens,), dtype=torch.float32)
    scale = x if norms is None else norms
    with on_device(x):
        if threshold is None:
            gate_cuts_kernel[(tokens,)](
                x, scale, cuts, features, kept, x.stride(0),
                WEIGHTED=norms is not None, FEATURES=triton.next_power_of_2(features), num_warps=warps_of(features),
            )  # fmt: skip
        gated_matmul_kernel[(tiles, splits)](
            x, columns, scale, cuts, x if bias is None else bias, partial,
            tokens, rows, features, 0.0 if threshold is None else threshold,
            x.stride(0), columns.stride(0), tokens * rows, per_split,
            WEIGHTED=norms is not None, BY_COUNT=threshold is None, HAS_BIAS=bias is not None,
            ROWS=ROWS, INPUTS=inputs, TOKENS=size, num_warps=WARPS,
        )  # fmt: skip
        return add_up(partial, out)
