"""The meaning of looked-up weights, in plain torch: codes that name entries of a table, and scales that may be coded too.

A weight (m, n) is cut into pieces of `dim` consecutive inputs of a row. Each piece is an entry of a table, which has 2^bits
of them; with several tables, each serves a block of the matrix. Groups of inputs may have a scale:
``weight[i, j] = table[code[i, j // dim]][j % dim] * scale[i, j // group]``.

Every function traces: sizes of the weight are fixed. All of it runs in float64 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.reference import spread, unpack_codes

__all__ = ["SUPER_BLOCK", "code_scales", "decode_scales", "lookup", "nearest_codes"]

# Scales that share a scale of their own, where scales are coded (Dettmers et al., QLoRA, 2023).
SUPER_BLOCK = 256


def lookup(
    values: Tensor, table: Tensor, scale: Tensor | None, *, bits: int, group: int | None, features: int
) -> Tensor:
    """Return the weight (m, features) that codes stand for, in the table's dtype.

    Parameters
    ----------
    values
        uint8 (m, bytes), codes as `pack_codes` packs them, one for each piece of a row.
    table
        (row blocks, column blocks, 2^bits, dim): the tables of the blocks that rows and pieces are cut into evenly.
    scale
        (m, groups) or None.
    bits, group, features
        Of a code; inputs in a group, None for all; inputs of the weight.

    Examples
    --------
    >>> table = torch.tensor([-1.0, 0.0, 0.5, 1.0]).reshape(1, 1, 4, 1)
    >>> lookup(torch.tensor([[0b1101]], dtype=torch.uint8), table, None, bits=2, group=None, features=2)
    tensor([[0., 1.]])
    """
    m = values.shape[0]
    rows, columns, entries, dim = table.shape
    pieces = -(-features // dim)
    index = unpack_codes(values, bits, pieces).to(torch.int32)
    if rows > 1:
        block = torch.arange(m, dtype=torch.int32, device=values.device) * rows // m
        index = index + (block * (columns * entries)).unsqueeze(1)
    if columns > 1:
        index = index + torch.arange(pieces, dtype=torch.int32, device=values.device) * columns // pieces * entries
    found = table.reshape(-1, dim).index_select(0, index.reshape(-1))
    weight = found.reshape(m, pieces * dim)[:, :features]
    return weight if scale is None else weight * spread(scale, features, group).to(weight.dtype)


def nearest_codes(numbers: Tensor, table: Tensor) -> Tensor:
    """Return the place (any shape) of the entry of `table` (entries,) nearest to each number, int64; of equal ones the first.

    Examples
    --------
    >>> nearest_codes(torch.tensor([0.2, -3.0]), torch.tensor([0.0, 1.0, -1.0])).tolist()
    [0, 2]
    """
    ordered, places = torch.sort(table.to(numbers.dtype), stable=True)
    first = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    ordered, places = ordered[first], places[first]
    between = (ordered[1:] + ordered[:-1]) / 2
    return places[torch.bucketize(numbers.contiguous(), between)]


def code_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Code scales (m, groups) in eight bits ("double quantization").

    Returns
    -------
    codes, step, mean
        int8 (m, groups); (super blocks,), one for each `SUPER_BLOCK` scales in row order; (1,).
    """
    flat = scale.reshape(-1)
    mean = flat.mean().reshape(1)
    padded = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % SUPER_BLOCK)).reshape(-1, SUPER_BLOCK)
    step = padded.abs().amax(1) / 127
    codes = torch.round(padded / torch.where(step == 0, 1, step).unsqueeze(1)).to(torch.int8)
    return codes.reshape(-1)[: flat.numel()].reshape(scale.shape), step, mean


def decode_scales(codes: Tensor, step: Tensor, mean: Tensor) -> Tensor:
    """Undo `code_scales` up to rounding: (m, groups) in the dtype of `step`.

    Examples
    --------
    >>> decode_scales(*code_scales(torch.tensor([[1.0, 3.0]])))
    tensor([[1., 3.]])
    """
    m, groups = codes.shape
    flat = codes.reshape(-1)
    block = torch.arange(flat.shape[0], device=codes.device) // SUPER_BLOCK
    return (flat.to(step.dtype) * step.index_select(0, block) + mean).reshape(m, groups)
