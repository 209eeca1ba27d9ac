"""Codes of 2:4 weights in lane order, written out for several groups of four inputs at once.

Lanes and the order of vectors are those of `recast.kernels.sparse_matmul.lanes`: lane t holds group ``4 s + t`` of the s-th
sixteen inputs. Its two codes stand in the halves of a word, each in the half where it belongs, at bit ``w j`` of both for codes of w
bits: a word holds ``16 / w`` groups, j counting them. A block is four such words for each lane: 256 inputs of four bits, 128 of
eight.

Codes are stored exclusive-or the code of zero, so that an input that is dropped is 0 like the bits that hold nothing. Marks are
single bits at the places of codes, of which a multiplication by ``2^w - 1`` makes masks for all groups of the word. So a word is
written out as two, inputs 0, 1 and 2, 3 of every group, in the ten operations that `sparse_matmul` takes for one group; then codes
are decoded as those of a weight without zeros. Marks of word i are bit ``w j + i`` of a word of marks, for what is kept in inputs
0, 1; and for groups that exchange halves bit ``w j + i`` of the lower half of a second word, or with eight bits ``w j + 4 + i``
of the first. So four inputs take 12 bits with four bits a code, and 20 with eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_of", "from_lanes", "marks_of", "to_lanes"]


def block_of(bits: int) -> int:
    """Return how many inputs make a block.

    Examples
    --------
    >>> block_of(4), block_of(8)
    (256, 128)
    """
    if bits not in (4, 8):
        raise ValueError(f"2:4 lane order: codes of {bits} bits have none; 4 or 8 would work")
    return 1024 // bits


def marks_of(bits: int) -> int:
    """Return how many words of marks a lane has in a block."""
    return 2 if bits == 4 else 1


def to_lanes(codes: Tensor, places: Tensor, bits: int, zero: int) -> tuple[Tensor, Tensor]:
    """Put the codes of two of every four inputs into lane order.

    Parameters
    ----------
    codes, places
        (m, 2 groups): 0 to 2^bits - 1; 0 to 3, rising within a group.
    bits
        4 or 8.
    zero
        The code that stands for zero: that of inputs that are dropped, and of those that fill up the last block.

    Returns
    -------
    words, marks
        int32 (m, 16 blocks) and (m, 8 blocks), with eight bits (m, 4 blocks).

    Examples
    --------
    >>> words, marks = to_lanes(torch.tensor([[9, 15]]), torch.tensor([[1, 3]]), 4, 8)
    >>> hex(words[0, 0]), [hex(word) for word in marks[0, :2]]  # exchanged, as place 1 is in the upper half
    ('0x10007', ['0x1fffe', '0xffff'])
    """
    each, per_block = 16 // bits, block_of(bits) // 4
    stored = codes.to(torch.int32) ^ zero
    missing = -(codes.shape[1] // 2) % per_block
    m = codes.shape[0]

    def groups(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Both of every group, (m, blocks, word, group of the word, lane)."""
        pairs = torch.nn.functional.pad(tensor, (0, 2 * missing)).reshape(m, -1, 4, each, 4, 2)
        return pairs[..., 0], pairs[..., 1]

    (one, other), (first, second) = groups(stored), groups(places.to(torch.int32))
    low, high = torch.where(first == 1, other, one), torch.where(first == 1, one, other)
    at = (bits * torch.arange(each, dtype=torch.int32, device=codes.device)).reshape(each, 1)
    words = _gathered(low, high, at).transpose(2, 3)
    plane = torch.arange(4, dtype=torch.int32, device=codes.device).reshape(4, 1, 1) + at
    kept = _gathered((first == 0).int(), ((first == 1) | (second == 1)).int(), plane).sum(2, dtype=torch.int32)
    alike = (first + second + 1) % 2
    alike = _gathered(alike, 0 * alike, plane + (4 if bits == 8 else 0)).sum(2, dtype=torch.int32)
    marks = kept | alike if bits == 8 else torch.stack((kept, alike), -1)
    return words.reshape(m, -1).contiguous(), marks.reshape(m, -1).contiguous()


def _gathered(low: Tensor, high: Tensor, at: Tensor) -> Tensor:
    """Words of both halves' codes of all groups: (m, blocks, word, lane)."""
    return ((low << at) | (high << (16 + at))).sum(3, dtype=torch.int32)


def from_lanes(words: Tensor, marks: Tensor, bits: int, zero: int, features: int) -> Tensor:
    """Return the codes of all inputs, uint8 (m, features): `zero` for those that are dropped.

    Examples
    --------
    >>> from_lanes(*to_lanes(torch.tensor([[9, 15]]), torch.tensor([[1, 3]]), 4, 8), 4, 8, 4).tolist()
    [[8, 9, 8, 15]]
    """
    m, each = words.shape[0], 16 // bits
    word = words.reshape(m, -1, 4, 4, 1).transpose(2, 3)  # (m, blocks, word, lane, group)
    mark = marks.reshape(m, -1, 1, 4, marks_of(bits))
    at = bits * torch.arange(each, dtype=torch.int32, device=words.device)
    plane = torch.arange(4, dtype=torch.int32, device=words.device).reshape(4, 1, 1) + at
    low, high = word >> at & (2**bits - 1), word >> (16 + at) & (2**bits - 1)
    keeps_low, keeps_high = (mark[..., :1] >> shift & 1 for shift in (plane, 16 + plane))
    alike = mark[..., -1:] >> (plane + (4 if bits == 8 else 0)) & 1
    # The second pair has what the first one left; with halves exchanged where both places are even, or both odd.
    third = torch.where(alike == 1, high * keeps_low, low * (1 - keeps_low))
    fourth = torch.where(alike == 1, low * keeps_high, high * (1 - keeps_high))
    codes = torch.stack((low * keeps_low, high * keeps_high, third, fourth), -1)
    codes = codes.transpose(3, 4).reshape(m, -1)[:, :features]
    return (codes ^ zero).to(torch.uint8)
