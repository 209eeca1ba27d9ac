"""Bitmap weights as a matrix unit takes them, in plain torch: the layout, the dense matrix it stands for, and the product.

A *quad* is four rows, an *octet* eight columns. The marks of a quad's octet are one word: bit ``4 r + t`` is the place in row r and
column ``2 t`` of the octet, bit ``4 r + t + 16`` the one right of it. So the lanes of a matrix unit, each of which takes two
neighbouring numbers of a row, find theirs by their own number. Values stand quad by quad, octet by octet and within an octet row by
row, and what 32 lanes load at a time is one run of neighbours. Of every `STEP` columns the first value's place is kept, so
that they can be decoded apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STEP", "bitmap_matmul", "from_quads", "held_bytes", "marks_of", "of_places", "to_quads"]

STEP = 128
_SLAB = 1024


def held_bytes(rows: int, columns: int, count: int, itemsize: int) -> int:
    """Return the bytes of a weight in this layout: of `count` values, a bit for each place, and four bytes for 4 x 128 places.

    Examples
    --------
    >>> held_bytes(4, 128, 256, 2)
    580
    """
    blocks = -(-rows // 4) * -(-columns // STEP)
    return itemsize * count + blocks * (4 * STEP // 8 + 4)


def to_quads(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out a matrix with values at the places of a mask.

    Parameters
    ----------
    values
        (k,), in row-major order of their places.
    mask
        (m, n), bool, k places of it set.

    Returns
    -------
    values, words, starts
        (k + 2,), a zero before and after them; int32 (⌈m / 4⌉, 16 ⌈n / 128⌉) and (⌈m / 4⌉, ⌈n / 128⌉).

    Examples
    --------
    >>> mask = torch.tensor([[True, False, False], [False, True, True]])
    >>> held, words, starts = to_quads(torch.tensor([5.0, 6.0, 7.0]), mask)
    >>> held.tolist(), hex(words[0, 0]), starts.tolist()
    ([0.0, 5.0, 6.0, 7.0, 0.0], '0x100021', [[1]])
    """
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    before = 0
    # Slabs of rows, for places take eight bytes each.
    for rows in mask.split(_SLAB):  # type: ignore[no-untyped-call]
        count = int(rows.sum())
        held.append(_slab(values[before : before + count], rows, before))
        before += count
    ordered, words, starts = (torch.cat(parts) for parts in zip(*held, strict=True))
    return torch.nn.functional.pad(ordered, (1, 1)).contiguous(), words, starts


def _slab(values: Tensor, mask: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a matrix as `to_quads` has them, their values without zeros around, so many being before them."""
    blocks = _in_blocks(mask)
    place = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    place[mask] = torch.arange(len(values), device=mask.device)
    words = (blocks * (1 << _bits(mask.device))).sum((-2, -1))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    counts = blocks.sum((-2, -1)).reshape(words.shape[0], -1, STEP // 8).sum(-1)
    starts = (counts.flatten().cumsum(0).reshape(counts.shape) - counts + before + 1).to(torch.int32)
    return values[_in_blocks(place)[blocks]], words, starts


def _bits(device: torch.device) -> Tensor:
    """Bit of each place of an octet's four rows, (4, 8)."""
    bits = torch.arange(16, device=device).reshape(4, 4)
    return torch.stack((bits, bits + 16), -1).reshape(4, 8)


def _in_blocks(matrix: Tensor) -> Tensor:
    """Cut a matrix into (quads, octets, 4, 8), its ends filled up with zeros."""
    m, n = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, -n % STEP, 0, -m % 4))
    return whole.reshape(-1, 4, whole.shape[1] // 8, 8).transpose(1, 2)


def marks_of(words: Tensor) -> Tensor:
    """Return the marks of words (quads, octets): bool (quads, octets, 4, 8)."""
    return (words[:, :, None, None] >> _bits(words.device).to(torch.int32) & 1) == 1


def from_quads(values: Tensor, words: Tensor, rows: int, columns: int) -> Tensor:
    """Write the matrix (rows, columns) out.

    Examples
    --------
    >>> mask = torch.rand(5, 200) < 0.5
    >>> held, words, _ = to_quads(torch.arange(1.0, int(mask.sum()) + 1), mask)
    >>> bool((from_quads(held, words, 5, 200)[mask] == torch.arange(1.0, int(mask.sum()) + 1)).all())
    True
    """
    marks = marks_of(words)
    spread = values[marks.flatten().to(torch.int64).cumsum(0)].reshape(marks.shape)
    whole = torch.where(marks, spread, torch.zeros((), dtype=values.dtype, device=values.device))
    return whole.transpose(1, 2).reshape(4 * words.shape[0], -1)[:rows, :columns]


def of_places(matrix: Tensor, words: Tensor, count: int) -> Tensor:
    """Take the numbers at marked places out of a matrix (m, n): as values stand, (count,), the zeros around them included."""
    marks = marks_of(words).flatten()
    numbers = _in_blocks(matrix).flatten()
    place = torch.where(marks, marks.to(torch.int64).cumsum(0), 0)
    return numbers.new_zeros(count).index_add(0, place, torch.where(marks, numbers, 0))


def bitmap_matmul(x: Tensor, values: Tensor, words: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    """Multiply vectors (..., n) by a weight of such values and words, ``x Wᵀ + bias``.

    Examples
    --------
    >>> held, words, _ = to_quads(torch.tensor([5.0]), torch.tensor([[False, True]]))
    >>> bitmap_matmul(torch.tensor([[1.0, 2.0]]), held, words, 1).tolist()
    [[10.0]]
    """
    weight = from_quads(values.to(x.dtype), words, rows, x.shape[-1])
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
