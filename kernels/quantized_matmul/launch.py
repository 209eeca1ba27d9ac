"""Calls the Triton kernel of packed codes: the tile for a number of tokens, the sums that zero points need, splits and their sum.

Importing this file needs torch alone; calling it needs Triton, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.kernels.epilogue import launch as epilogues
from recast.kernels.epilogue.reference import NOTHING, Epilogue
from recast.kernels.quantized_matmul.lanes import block_of
from recast.kernels.tiles import Tile, cut, interpreting, on_device, precision_of

__all__ = [
    "KINDS",
    "WRITTEN_OUT",
    "constants",
    "launch",
    "middle_of",
    "pairs_of",
    "steps_of",
    "sums_of",
    "write_out",
]

WRITTEN_OUT = Tile(64, 16, 4)  # rows and warps of a block that writes out
KINDS = ("integer", "table", "pairs", "float")


def steps_of(bits: int, group: int) -> int:
    """Return how many sixteens of inputs are summed before they are scaled.

    Raises
    ------
    ValueError
        A group (0 for all inputs of a row) is no number of sixteens.

    Examples
    --------
    >>> steps_of(4, 128), steps_of(4, 32), steps_of(2, 0), steps_of(4, 48)
    (8, 2, 16, 1)
    """
    if group % 16:
        raise ValueError(
            f"the kernel scales sums of 16 inputs: groups of {group} do not divide so; 32, 64 or 128 would"
        )
    step = math.gcd(group, block_of(bits)) // 16 if group else block_of(bits) // 16
    return step & -step  # pieces of a product are joined two by two


def middle_of(bits: int, kind: str, dtype: torch.dtype) -> float:
    """Return what decoding adds to the code of zero, beside its zero point: codes count from the middle where there is none.

    Examples
    --------
    >>> middle_of(4, "integer", torch.bfloat16), middle_of(8, "integer", torch.bfloat16)
    (128.0, 0.0)
    """
    if kind != "integer" or bits == 8:
        return 0.0
    return {torch.bfloat16: 128.0, torch.float16: 1024.0}.get(dtype, -float(2 ** (bits - 1)))


def pairs_of(table: Tensor) -> Tensor:
    """Return a table of 16-bit floats (k,) as one of pairs, int32 (k^2,): entry ``i + k j`` holds those of i and of j.

    Examples
    --------
    >>> pairs = pairs_of(torch.tensor([1.0, 2.0], dtype=torch.float16))
    >>> [hex(entry) for entry in pairs.tolist()]
    ['0x3c003c00', '0x3c004000', '0x40003c00', '0x40004000']
    """
    bits = table.view(torch.int16).to(torch.int32) & 0xFFFF
    return ((bits[:, None] << 16) | bits[None, :]).reshape(-1)


def constants(bits: int, group: int, kind: str, dtype: torch.dtype, tile: Tile, *, zeros: bool) -> dict[str, object]:
    """Return the kernel's constants but for those that say which operands it has."""
    middle = 0.0 if kind != "integer" or zeros or bits == 8 else middle_of(bits, kind, dtype) + 2 ** (bits - 1)
    return {
        "BITS": bits,
        "BLOCK": block_of(bits),
        "STEP": steps_of(bits, group),
        "GROUP": group,
        "KIND": kind,
        "HAS_MIDDLE": zeros,
        "MIDDLE": middle,
        "WIDE": interpreting(),
        "PRECISION": precision_of(dtype),
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "WARPS": tile.warps,
    }


def launch(
    x: Tensor,
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    inner: Tensor | None,
    *,
    bits: int,
    group: int,
    kind: str,
    epilogue: Epilogue = NOTHING,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Multiply vectors by a weight in lane order.

    Parameters
    ----------
    x
        (tokens, n), float32, float16 or bfloat16.
    values, high_values
        As `lanes.to_lanes` gives them: int32 (m, words).
    scale, zero
        (groups, m), contiguous, or None; `zero` holds whole numbers in a floating dtype.
    table
        (2^bits,) for kind "table"; `pairs_of` such a one, in x's dtype, for kind "pairs".
    bias
        (m,) or None.
    left, inner
        (m, rank) and (tokens, rank): their product is added, in the same pass. Or None.
    bits, group, kind
        2, 3, 4 or 8; inputs in a group, a multiple of 16, 0 for all; one of `KINDS`.
    epilogue
        What is done with sums before they are stored.
    tile, splits
        Chosen by the number of tokens and the device if not given.

    Returns
    -------
    (tokens, m) in x's dtype, or half as many columns if rows are gated.
    """
    from recast.kernels.quantized_matmul.triton import dequantizing_matmul_kernel

    tokens, features = x.shape
    rows = values.shape[0]
    out = x.new_empty((tokens, epilogue.outputs(rows)))
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = -(-features // block_of(bits))
    cuts = cut(x, rows, blocks, tile, splits)
    fixed = constants(bits, group, kind, x.dtype, cuts.tile, zeros=zero is not None)
    needs_sums = zero is not None or fixed["MIDDLE"] != 0
    width = steps_of(bits, group) * 16
    sums = sums_of(x, width, -(-blocks * block_of(bits) // width)) if needs_sums else None
    middle = None if zero is None else zero.to(torch.float32) + middle_of(bits, kind, x.dtype)
    partial = cuts.partial(out, rows)
    inside = epilogue if partial is out else NOTHING  # sums are complete only when they are added up
    with on_device(x):
        dequantizing_matmul_kernel[cuts.grid](
            x, _or(sums, x), values, _or(high_values, values), _or(scale, x), _or(middle, x), _or(table, x),
            _or(left, x), _or(inner, x), _or(bias, x),
            _or(inside.factor, x), _or(inside.residual, x), partial,
            tokens, rows, features, 1 if scale is None else scale.shape[0], blocks, 0 if left is None else left.shape[1],
            x.stride(0), tokens, values.stride(0), 0 if high_values is None else high_values.stride(0),
            rows, 0 if left is None else left.stride(0), 0 if inner is None else inner.stride(0),
            partial.shape[-1], tokens * rows, cuts.per_split,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, RANK=_rank(left), **epilogues.constants(inside),
            num_warps=cuts.tile.warps, num_stages=cuts.tile.stages, **fixed,
        )  # fmt: skip
        return epilogues.add_up(partial, out, epilogue)


def write_out(
    values: Tensor,
    high_values: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    group: int,
    kind: str,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Write a weight in lane order out: (m, features) in `dtype`. Parameters as in `launch`; for many vectors, which use it often."""
    from recast.kernels.quantized_matmul.triton import write_out_kernel

    rows = values.shape[0]
    out = values.new_empty((rows, features), dtype=dtype)
    if not out.numel():
        return out
    blocks, tile = -(-features // block_of(bits)), WRITTEN_OUT
    fixed = constants(bits, group, kind, dtype, tile, zeros=zero is not None)
    for name in ("WIDE", "PRECISION", "TOKENS"):
        del fixed[name]
    middle = None if zero is None else zero.to(torch.float32) + middle_of(bits, kind, dtype)
    with on_device(values):
        write_out_kernel[(-(-rows // tile.rows), blocks)](
            values, _or(high_values, values), _or(scale, values), _or(middle, values), _or(table, values), out,
            rows, features, 1 if scale is None else scale.shape[0],
            values.stride(0), 0 if high_values is None else high_values.stride(0), rows, out.stride(0),
            HAS_SCALE=scale is not None, num_warps=tile.warps, **fixed,
        )  # fmt: skip
    return out


def sums_of(x: Tensor, width: int, steps: int) -> Tensor:
    """Return sums of each `width` inputs, float32 (steps, tokens).

    Examples
    --------
    >>> sums_of(torch.tensor([[1.0, 2.0, 3.0]]), 2, 2).tolist()
    [[3.0], [3.0]]
    """
    tokens, features = x.shape
    padded = torch.nn.functional.pad(x, (0, steps * width - features))
    return padded.reshape(tokens, steps, width).sum(2, dtype=torch.float32).T.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Stands for an operand that is not there; nothing reads it."""
    return other if tensor is None else tensor


def _rank(left: Tensor | None) -> int:
    """Part of the rank that is taken at a time, 0 without one."""
    return 0 if left is None else 16 if left.shape[1] <= 16 else 32 if left.shape[1] <= 32 else 64
