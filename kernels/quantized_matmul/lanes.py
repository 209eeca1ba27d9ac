"""Codes in lane order: laid out so that one load of 16 bytes gives a lane of a matrix unit its next numbers, ready to be decoded.

Matrix units of NVIDIA's GPUs take sixteen inputs of a row at a time from four lanes; lane t holds the pairs of inputs
``8 m + 2 t + h`` with ``h = 0, 1`` in the halves of a register, ``m = 0, 1``. Eights of inputs are counted by ``p``, so input k
of a block is ``k = 8 p + 2 t + h``. A lane's words follow each other, and the code of ``(p, t, h)`` with `w` bits stands in word
``p // (16 / w)`` of lane t, at bit ``16 h + w (p mod 16 / w)``: shifted and masked, a word is a pair of codes in its halves.

Three bits are split into two planes, two bits and one, as `reference.pack_codes` splits them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_of", "from_lanes", "to_lanes"]


def block_of(bits: int) -> int:
    """Return how many inputs make a block: four words for each lane, for three bits four and two.

    Examples
    --------
    >>> [block_of(bits) for bits in (2, 3, 4, 8)]
    [256, 256, 128, 64]
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"lane order: codes of {bits} bits have none; 2, 3, 4 or 8 would work")
    return 256 if bits == 3 else 512 // bits


def to_lanes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Put codes 0..2^bits-1 (m, n) into lane order; inputs that fill up the last block get code 0.

    Returns
    -------
    words, high_words
        int32 (m, 16 blocks); for three bits also (m, 8 blocks), of the highest bit.

    Examples
    --------
    >>> words, _ = to_lanes(torch.arange(16).reshape(1, 16), 4)
    >>> hex(words[0, 0]), hex(words[0, 4])  # lanes 0 and 1: inputs 0, 1, 8, 9 and 2, 3, 10, 11
    ('0x910080', '0xb300a2')
    """
    block = block_of(bits)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % block))
    if bits == 3:
        return _plane(codes & 3, 2, block), _plane(codes >> 2, 1, block)
    return _plane(codes, bits, block), None


def _plane(codes: Tensor, width: int, block: int) -> Tensor:
    m, n = codes.shape
    each = 16 // width
    pieces = codes.reshape(m, n // block, block // (8 * each), each, 4, 2)
    words = torch.zeros(m, n // block, 4, block // (8 * each), dtype=torch.int32, device=codes.device)
    for i in range(each):
        for half in range(2):
            words |= pieces[:, :, :, i, :, half].transpose(2, 3).to(torch.int32) << (16 * half + width * i)
    return words.reshape(m, -1)


def from_lanes(words: Tensor, high_words: Tensor | None, bits: int, features: int) -> Tensor:
    """Undo `to_lanes`: codes (m, features), uint8.

    Examples
    --------
    >>> codes = torch.arange(8).repeat(1, 40)
    >>> bool((from_lanes(*to_lanes(codes, 3), 3, 320) == codes).all())
    True
    """
    block = block_of(bits)
    codes = _codes(words, 2 if bits == 3 else bits, block)
    if high_words is not None:
        codes = codes | _codes(high_words, 1, block) << 2
    return codes[:, :features].to(torch.uint8)


def _codes(words: Tensor, width: int, block: int) -> Tensor:
    m, each = words.shape[0], 16 // width
    count = block // (8 * each)
    lanes = words.reshape(m, -1, 4, count).transpose(2, 3)
    halves = [
        torch.stack([lanes >> (16 * half + width * i) & (2**width - 1) for half in range(2)], -1) for i in range(each)
    ]
    return torch.stack(halves, 3).reshape(m, -1)
