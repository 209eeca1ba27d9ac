"""2:4 weights in lane order: every lane of a matrix unit loads whole groups of four inputs, two values and their places.

See `recast.kernels.quantized_matmul.lanes` for what a matrix unit takes. Here lane t holds group ``4 s + t`` of the s-th sixteen
inputs, so its four numbers are neighbours in the row, and the vectors are read in the order that this makes: number
``8 m + 2 t + h`` of a sixteen is input ``4 t + 2 m + h``. A block has 128 inputs: of each lane two times four words, a word being
the two values of a group, and one word with the marks of eight groups, three bits each.

A group is written out as two words, its inputs 0, 1 and 2, 3. Values are stored in the half where they belong, the first in the
upper one if its place is 1. Marks say which halves of the stored word go to the first of the two words: bit s the lower half, bit
s + 16 the upper one. The second word takes the others; but if both values stand at even places, or both at odd ones (bit s + 8),
it takes the same half of the stored word with its halves exchanged. So a group takes about ten operations on 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "from_lanes", "to_lanes"]

BLOCK = 128


def to_lanes(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Put two of every four inputs into lane order; the last block is filled up with zeros.

    Parameters
    ----------
    values
        (m, 2 groups), float16 or bfloat16.
    places
        (m, 2 groups), 0 to 3, rising within a group.

    Returns
    -------
    words, marks
        int32 (m, 32 blocks) and int32 (m, 4 blocks): nine sixteenths of the dense bytes.

    Examples
    --------
    >>> values = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    >>> words, marks = to_lanes(values, torch.tensor([[1, 3]]))
    >>> hex(words[0, 0]), hex(marks[0, 0])  # exchanged, as place 1 is in the upper half
    ('0x3c004000', '0x1fffe')
    """
    m, count = values.shape
    missing = -count % (BLOCK // 2)
    bits = torch.nn.functional.pad(values, (0, missing)).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    first, second = torch.nn.functional.pad(places.to(torch.int32), (0, missing)).reshape(m, -1, 2).unbind(2)
    pairs = torch.where((first == 1).unsqueeze(2), bits.reshape(m, -1, 2).flip(2), bits.reshape(m, -1, 2))
    # (block, half of its sixteens, sixteen, lane)
    words = (pairs[..., 0] | pairs[..., 1] << 16).reshape(m, -1, 2, 4, 4).transpose(3, 4)
    alike = (first + second + 1) % 2
    mark = (first == 0).to(torch.int32) | alike << 8 | ((first == 1) | (second == 1)).to(torch.int32) << 16
    shifted = mark.reshape(m, -1, 8, 4) << torch.arange(8, dtype=torch.int32, device=values.device).unsqueeze(1)
    return words.reshape(m, -1).contiguous(), shifted.sum(2, dtype=torch.int32).reshape(m, -1)


def from_lanes(words: Tensor, marks: Tensor, dtype: torch.dtype, features: int) -> Tensor:
    """Return the matrix (m, features) in `dtype`, which is that of the values.

    Examples
    --------
    >>> values = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    >>> from_lanes(*to_lanes(values, torch.tensor([[1, 3]])), torch.float16, 4)
    tensor([[0., 1., 0., 2.]], dtype=torch.float16)
    """
    m = words.shape[0]
    word = words.reshape(m, -1, 2, 4, 4).transpose(3, 4).reshape(m, -1, 8, 4)
    sixteen = torch.arange(8, dtype=torch.int32, device=words.device).unsqueeze(1)
    mark = marks.reshape(m, -1, 1, 4) >> sixteen
    kept = (mark & 0x00010001) * 0xFFFF
    exchanged = word << 16 | (word >> 16 & 0xFFFF)
    alike = (mark & 0x100) != 0
    halves = torch.stack((word & kept, torch.where(alike, exchanged & kept, word & ~kept)), -1)
    bits = torch.stack((halves & 0xFFFF, halves >> 16 & 0xFFFF), -1)
    return bits.to(torch.int16).view(dtype).reshape(m, -1)[:, :features]
