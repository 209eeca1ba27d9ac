"""Calls the Triton kernels of gated inputs: the cut where inputs are kept by number, and the columns that are wanted.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.tiles import on_device

__all__ = ["FEW", "INPUTS", "LARGEST", "ROWS", "launch_columns", "launch_cuts", "power_of_2", "warps_of"]

# Vectors that are multiplied at a time: of four that keep half of their inputs each, 94 % of the columns are wanted.
FEW = 4
# Inputs among which the largest are found at once: as many numbers as the registers of one block hold.
LARGEST = 1 << 15
# Outputs and columns that a block of one warp takes at a time: sixteen loads of 16 bytes for each thread.
ROWS, INPUTS = 256, 16
# Blocks that a processor should have: what hides the wait for loads that must know their masks first.
_BLOCKS = 16


def power_of_2(number: int) -> int:
    """Return the next power of two.

    Examples
    --------
    >>> [power_of_2(number) for number in (1, 3, 4, 5)]
    [1, 4, 4, 8]
    """
    return 1 << max(0, number - 1).bit_length()


def warps_of(features: int) -> int:
    """Return the warps that find the largest of so many inputs, 32 or fewer in each thread."""
    return max(4, min(32, power_of_2(features) // 1024))


def launch_cuts(x: Tensor, norms: Tensor | None, kept: int) -> Tensor:
    """Find the `kept`-th largest score of each vector, float32 (tokens,).

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16; n at most `LARGEST`.
    norms
        float32 (n,) or None.
    kept
        1 to n.
    """
    from recast.kernels.gated_matmul.triton import gate_cuts_kernel

    tokens, features = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    cuts = x.new_empty((tokens,), dtype=torch.float32)
    with on_device(x):
        gate_cuts_kernel[(tokens,)](
            x, x if norms is None else norms, cuts, features, kept, x.stride(0),
            WEIGHTED=norms is not None, FEATURES=power_of_2(features), num_warps=warps_of(features),
        )  # fmt: skip
    return cuts


def launch_columns(x: Tensor, columns: Tensor, bias: Tensor | None, *, splits: int | None = None) -> Tensor:
    """Multiply up to `FEW` vectors by the columns whose inputs are not zero in all of them.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    columns
        (n, m), contiguous along m, in x's dtype.
    bias
        (m,) or None.
    splits
        Into how many sums the inputs are cut; chosen by the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype.
    """
    from recast.kernels.epilogue.launch import add_up
    from recast.kernels.gated_matmul.triton import columns_matmul_kernel

    (tokens, features), rows = x.shape, columns.shape[1]
    out = x.new_empty((tokens, rows))
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles, pieces = -(-rows // ROWS), -(-features // INPUTS)
    if splits is None:
        cuda = x.device.type == "cuda"
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 1
        splits = max(1, min(pieces, processors * _BLOCKS // tiles, 64))
    per_split = -(-pieces // splits)
    splits = -(-pieces // per_split)
    partial = out if splits == 1 else out.new_empty((splits, tokens, rows), dtype=torch.float32)
    with on_device(x):
        columns_matmul_kernel[(tiles, splits)](
            x, columns, x if bias is None else bias, partial,
            tokens, rows, features, x.stride(0), columns.stride(0), tokens * rows, per_split,
            HAS_BIAS=bias is not None, ROWS=ROWS, INPUTS=INPUTS, TOKENS=power_of_2(tokens), num_warps=1,
        )  # fmt: skip
        return add_up(partial, out)
