"""Values at any places in lane order: a bitmap of which a lane loads its words, and values it finds by counting bits.

See `recast.kernels.quantized_matmul.lanes` for what a matrix unit takes. As with 2:4, lane t holds inputs ``4 t + j`` of a sixteen,
j below 4, and the vectors are read in the order that this makes.

A *word* has 32 bits, those of 16 inputs in two neighbouring rows: bit ``16 r + 4 t + j`` stands for row r of the two, lane t and
its j-th input, and is set where there is *no* value, as masked it is then the number of bits that decoding shifts by. So a word
belongs to eight neighbouring lanes of a warp, four bits to each. Its values follow each other in the order of the bits: that of a bit
is as far behind the first one as there are values for lower bits, which one count of bits says for all four of a lane.

A *unit* has 16 rows and 128 inputs, sixteen by sixteen of the inputs, and in it pair by pair of the rows. Its values follow each other
too, from a multiple of 16 bytes on. What a warp needs at the same time, the same sixteen inputs of eight rows, thus stands side by
side: at half density 128 bytes, in which 32 lanes read, each its own. That is what the order is for: were values held lane by lane, or
row by row, such a load would touch as many lines of the cache as there are lanes, or rows.

Where a word's values begin is held, 16 bits from the beginning of the unit: GPUs count bits at an eighth of the rate of other
operations or less, so counting through the words before it would take longer than memory takes to bring these. A weight takes
``1 + 16/32 + 1/64`` bits and its values: at half density 9.5 bits, where a dense one takes 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "ROWS", "from_lanes", "to_lanes"]

# Rows and inputs of a unit.
ROWS, BLOCK = 16, 128
# Values that units are filled up to a multiple of, and rows that are laid out at a time: places take eight bytes each.
_WHOLE, _SLAB = 8, 512


def to_lanes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put the numbers of a matrix that are not zero into lane order.

    Parameters
    ----------
    weight
        (m, n), floating.

    Returns
    -------
    values
        (k,), in the matrix's dtype: the numbers, units filled up with zeros to a multiple of eight of them, and eight more zeros.
    words
        int32 (8 a, 8 b) for a times b units: eight pairs of rows and eight sixteens of inputs in each.
    starts
        int16, of the same shape: how many values of the unit are before those of a word.
    offsets
        int32 (a, b): where the values of a unit begin, counted in eights.

    Raises
    ------
    ValueError
        It is no matrix of floating point numbers.

    Examples
    --------
    >>> values, words, starts, offsets = to_lanes(torch.tensor([[0.0, 5.0], [7.0, 8.0]]))
    >>> values[:4].tolist(), hex(~words[0, 0]), offsets.tolist()
    ([5.0, 7.0, 8.0, 0.0], '0x30002', [[0]])
    """
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(
            f"lane order of sparse weights: the weight is {weight.dtype} {tuple(weight.shape)}; floating (m, n) is needed"
        )
    found = [_slab(rows) for rows in weight.split(_SLAB)]  # type: ignore[no-untyped-call]
    values, words, starts, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    before = counts.reshape(-1).cumsum(0).reshape(counts.shape) - counts
    # Lanes load four values from where theirs begin, whether they have so many or not.
    values = torch.nn.functional.pad(values, (0, _WHOLE))
    return values, words, starts, before.to(torch.int32)


def _slab(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, words, starts, and eights of values in each unit, int64."""
    m, n = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -n % BLOCK, 0, -m % ROWS))
    a, b = padded.shape[0] // ROWS, padded.shape[1] // BLOCK
    # (unit of rows, of inputs, sixteen, pair of rows, bit)
    ordered = padded.reshape(a, 8, 2, b, 8, 16).permute(0, 3, 4, 1, 2, 5).reshape(a, b, 64, 32)
    marks = ordered != 0
    each = marks.sum(-1)
    starts = each.cumsum(-1) - each
    eights = -(-each.sum(-1) // _WHOLE)
    first = (eights.reshape(-1).cumsum(0) - eights.reshape(-1)) * _WHOLE
    places = first.reshape(a, b, 1, 1) + starts.unsqueeze(-1) + marks.cumsum(-1) - 1
    values = weight.new_zeros(int(eights.sum()) * _WHOLE)
    values[places[marks]] = ordered[marks]
    bits = ((~marks).to(torch.int64) << torch.arange(32, device=weight.device)).sum(-1)
    words = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    return values, _by_rows(words, a, b), _by_rows(starts.to(torch.int16), a, b), eights


def _by_rows(of_words: Tensor, a: int, b: int) -> Tensor:
    """From (a, b, sixteen and pair of rows) to (pairs of rows, sixteens)."""
    return of_words.reshape(a, b, 8, 8).permute(0, 3, 1, 2).reshape(8 * a, 8 * b).contiguous()


def from_lanes(values: Tensor, words: Tensor, starts: Tensor, offsets: Tensor, rows: int, features: int) -> Tensor:
    """Undo `to_lanes`: the matrix (rows, features), in the values' dtype.

    Examples
    --------
    >>> weight = torch.tensor([[0.0, 5.0], [7.0, 8.0]])
    >>> from_lanes(*to_lanes(weight), 2, 2)
    tensor([[0., 5.],
            [7., 8.]])
    """
    a, b = offsets.shape
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    marks = (~words.unsqueeze(-1) >> bits) & 1
    first = offsets.to(torch.int64).repeat_interleave(8, 0).repeat_interleave(8, 1) * _WHOLE + starts
    places = first.unsqueeze(-1) + marks.cumsum(-1) - 1
    # A value of its own for the places without one, also where there are no others.
    held = torch.cat((values.new_zeros(1), values))
    dense = held[torch.where(marks == 1, places + 1, 0)]
    return dense.reshape(8 * a, 8 * b, 2, 16).transpose(1, 2).reshape(ROWS * a, BLOCK * b)[:rows, :features]
