"""Codes in blocks of 32 inputs, as `few_tokens.c` reads them: one load and a shift or a mask give eight neighbouring inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "block_count", "from_blocks", "to_blocks"]

BLOCK = 32


def block_count(features: int, group: int) -> int:
    """Return how many blocks hold a row: whole groups (0: one group), so that the last group is filled up.

    Raises
    ------
    ValueError
        Groups are no multiple of 32 inputs.

    Examples
    --------
    >>> block_count(577, 128), block_count(577, 0)
    (20, 19)
    """
    if group % BLOCK:
        raise ValueError(f"blocks hold {BLOCK} inputs: groups of {group} do not divide so; 32, 64 or 128 would")
    return -(-features // group) * (group // BLOCK) if group else -(-features // BLOCK)


def to_blocks(codes: Tensor, bits: int, group: int) -> Tensor:
    """Lay codes out.

    Parameters
    ----------
    codes
        (m, n), whole numbers from 0 on.
    bits
        2, 3, 4 or 8. With four, byte j of a block has the codes of inputs j and j + 16; with two, those of j, j + 8, j + 16
        and j + 24; with three, the same for the lower two bits, followed by the highest bits of all 32.
    group
        Inputs that share a scale, 0 for all of a row.

    Returns
    -------
    uint8 (m, 4 * bits * blocks).

    Examples
    --------
    >>> codes = torch.arange(40).remainder(16)[None]
    >>> to_blocks(codes, 4, 0)[0, :4].tolist()
    [0, 17, 34, 51]
    >>> torch.equal(from_blocks(to_blocks(codes, 4, 0), 4, 40), codes.to(torch.uint8))
    True
    """
    m, n = codes.shape
    blocks = block_count(n, group)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, blocks * BLOCK - n)).reshape(m, blocks, BLOCK)
    if bits == 8:
        return padded.reshape(m, -1)
    low = padded & 3 if bits == 3 else padded
    width = 2 if bits == 3 else bits
    several = low.reshape(m, blocks, 8 // width, 4 * width)
    found = several[:, :, 0].clone()
    for place in range(1, 8 // width):
        found |= several[:, :, place] << (place * width)
    if bits == 3:
        each = (padded >> 2).reshape(m, blocks, 4, 8) << torch.arange(8, dtype=torch.uint8)
        found = torch.cat((found, each.sum(-1, dtype=torch.uint8)), -1)
    return found.reshape(m, -1)


def from_blocks(packed: Tensor, bits: int, features: int) -> Tensor:
    """Undo `to_blocks`: uint8 (m, n)."""
    m = packed.shape[0]
    if bits == 8:
        return packed[:, :features]
    parts = packed.reshape(m, -1, 4 * bits)
    width = 2 if bits == 3 else bits
    found = torch.cat([parts[..., : 4 * width] >> (p * width) & (2**width - 1) for p in range(8 // width)], -1)
    if bits == 3:
        high = parts[..., 8:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        found = found | high.reshape(m, -1, BLOCK) << 2
    return found.reshape(m, -1)[:, :features]
