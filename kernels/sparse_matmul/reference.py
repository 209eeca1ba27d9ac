"""The meaning of sparse weights, in plain torch: how they are packed, and the dense matrices they stand for.

Three layouts. *N of M*: of every M consecutive inputs of a row N are kept, and each kept value has its place in the group
in ``⌈log2 M⌉`` bits: 2:4 in 16-bit floats takes 9/16 of the dense bytes. Inputs left over at the end make a shorter
group, of which N are kept if it has so many. *Bitmap*: one bit for every place, and the values in row-major order. *Tiled
CSL* (Flash-LLM, Xia et al., 2023): the values tile after tile, each with its place within the tile in 16 bits, and for each
tile where its values begin. Within a tile values are in row-major order; the published one spares a GPU's memory banks.

Everything traces (sizes of weights are fixed) and has gradients with respect to the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bitmap_to_dense",
    "index_bits",
    "kept_count",
    "nm_pack",
    "nm_to_dense",
    "pack_bits",
    "packed_bytes",
    "tile_count",
    "tiled_pack",
    "tiled_to_dense",
    "unpack_bits",
]


_SLAB = 256


def index_bits(of: int) -> int:
    """Return how many bits a place in a group of `of` takes."""
    return max(1, (of - 1).bit_length())


def kept_count(features: int, keep: int, of: int) -> int:
    """Return how many of a row's values are kept: `keep` of each full group, and of what is left over at most so many.

    Examples
    --------
    >>> kept_count(8, 2, 4), kept_count(9, 2, 4), kept_count(11, 2, 4)
    (4, 5, 6)
    """
    return features // of * keep + min(keep, features % of)


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (m, k) below ``2**bits`` into bytes (m, ⌈k bits / 8⌉), lowest bits first, each row for itself.

    Examples
    --------
    >>> pack_bits(torch.tensor([[1, 2, 3, 0, 3]]), 2).tolist()
    [[57, 3]]
    """
    m, k = codes.shape
    if m > _SLAB:
        return torch.cat([pack_bits(rows, bits) for rows in codes.split(_SLAB)])  # type: ignore[no-untyped-call]
    width = packed_bytes(k, bits) * 8
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    single = (codes.to(torch.uint8).unsqueeze(-1) >> places & 1).reshape(m, k * bits)
    single = torch.nn.functional.pad(single, (0, width - k * bits)).reshape(m, width // 8, 8)
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.int32)
    return (single * weights).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: bytes (m, ⌈count bits / 8⌉) to codes, uint8 (m, count)."""
    m = packed.shape[0]
    if 8 % bits == 0:
        whole = [packed >> (place * bits) & (2**bits - 1) for place in range(8 // bits)]
        return torch.stack(whole, -1).reshape(m, -1)[:, :count]
    single = torch.stack([packed >> place & 1 for place in range(8)], -1).reshape(m, -1)[:, : count * bits]
    single = single.reshape(m, count, bits)
    code = single[..., 0]
    for place in range(1, bits):
        code = code | (single[..., place] << place)
    return code


def nm_pack(weight: Tensor, mask: Tensor, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """Take the values (m, kept) at a mask (m, n) with `keep` of every `of` set, and their packed places."""
    kept = kept_count(weight.shape[1], keep, of)
    values, places = [], []
    # Slabs of rows bound the memory that the columns take, eight bytes each.
    for rows, marks in zip(weight.split(_SLAB), mask.split(_SLAB), strict=True):  # type: ignore[no-untyped-call]
        columns = marks.nonzero()[:, 1].reshape(len(rows), kept)
        values.append(rows.gather(1, columns))
        places.append(pack_bits(columns % of, index_bits(of)))
    return torch.cat(values), torch.cat(places)


def nm_to_dense(values: Tensor, indices: Tensor, *, keep: int, of: int, features: int) -> Tensor:
    """Write N-of-M values (m, kept) out as the matrix (m, features).

    Examples
    --------
    >>> dense = torch.tensor([[0.0, 5.0, 0.0, 7.0, 8.0, 9.0]])
    >>> values, indices = nm_pack(dense, dense != 0, 2, 4)
    >>> nm_to_dense(values, indices, keep=2, of=4, features=6)
    tensor([[0., 5., 0., 7., 8., 9.]])
    """
    m, kept = values.shape
    groups = -(-features // of)
    places = unpack_bits(indices, index_bits(of), kept)
    missing = groups * keep - kept
    if missing:
        # A shorter group at the end is filled with zeros at place 0.
        values = torch.cat((values, values.new_zeros(m, missing)), 1)
        places = torch.cat((places, places.new_zeros(m, missing)), 1)
    values, places = values.reshape(m, groups, keep), places.reshape(m, groups, keep)
    each = torch.arange(of, device=places.device, dtype=torch.uint8)
    nothing = torch.zeros((), dtype=values.dtype, device=values.device)
    dense = torch.where(places[..., :1] == each, values[..., :1], nothing)
    for slot in range(1, keep):
        # No two slots of a group share a place, so nothing is rounded by adding.
        dense = dense + torch.where(places[..., slot : slot + 1] == each, values[..., slot : slot + 1], nothing)
    return dense.reshape(m, groups * of)[:, :features]


def bitmap_to_dense(values: Tensor, bitmap: Tensor, features: int) -> Tensor:
    """Write values (k,), in row-major order, out at the bits set in a bitmap (m, ⌈features / 8⌉): (m, features).

    Examples
    --------
    >>> bitmap = pack_bits(torch.tensor([[0, 1, 0], [1, 0, 1]]), 1)
    >>> bitmap_to_dense(torch.tensor([5.0, 6.0, 7.0]), bitmap, 3)
    tensor([[0., 5., 0.],
            [6., 0., 7.]])
    """
    marks = unpack_bits(bitmap, 1, features)
    m = marks.shape[0]
    # The value of a place is the one at the number of marks before it; places without a mark read any and drop it.
    before = torch.cumsum(marks.reshape(-1).to(torch.int64), 0) - 1
    spread = values.index_select(0, before.clamp_min(0)).reshape(m, features)
    return torch.where(marks == 1, spread, torch.zeros((), dtype=values.dtype, device=values.device))


def tile_count(shape: tuple[int, int], tile: tuple[int, int]) -> int:
    """Return how many tiles cover a matrix; those at its ends may stick out.

    Examples
    --------
    >>> tile_count((128, 65), (128, 64))
    2
    """
    return -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])


def tiled_pack(mask: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Order the places that a mask (m, n) sets tile after tile.

    Parameters
    ----------
    mask
        (m, n), bool, with k places set.
    tile
        Rows and columns of a tile, of at most 32768 places.

    Returns
    -------
    order, places, offsets
        int64 (k,) into the matrix in row-major order; int16 (k,), the place within the tile in row-major order; int32, of each
        tile the number of places before it.
    """
    rows, columns = mask.nonzero().unbind(1)
    across = -(-mask.shape[1] // tile[1])
    which = rows // tile[0] * across + columns // tile[1]
    order = torch.argsort(which, stable=True)
    places = rows % tile[0] * tile[1] + columns % tile[1]
    counts = torch.bincount(which, minlength=tile_count((mask.shape[0], mask.shape[1]), tile))
    flat = rows * mask.shape[1] + columns
    return flat[order], places[order].to(torch.int16), (counts.cumsum(0) - counts).to(torch.int32)


def tiled_to_dense(
    values: Tensor, places: Tensor, offsets: Tensor, *, shape: tuple[int, int], tile: tuple[int, int]
) -> Tensor:
    """Write values (k,), tile after tile, out as the matrix (m, n).

    Examples
    --------
    >>> dense = torch.tensor([[0.0, 5.0, 6.0], [7.0, 0.0, 8.0]])
    >>> order, places, offsets = tiled_pack(dense != 0, (2, 2))
    >>> places.tolist(), offsets.tolist()
    ([1, 2, 0, 2], [0, 2])
    >>> tiled_to_dense(dense.reshape(-1)[order], places, offsets, shape=(2, 3), tile=(2, 2))
    tensor([[0., 5., 6.],
            [7., 0., 8.]])
    """
    across, count = -(-shape[1] // tile[1]), values.shape[0]
    begun = torch.zeros(count + 1, dtype=torch.int64, device=values.device)
    # A value is of the last tile that begins at or before it; tiles without values begin where the next one does.
    begun = begun.scatter_add(0, offsets.to(torch.int64), torch.ones_like(offsets, dtype=torch.int64))
    which = torch.cumsum(begun, 0)[:count] - 1
    within = places.to(torch.int64)
    rows = which // across * tile[0] + within // tile[1]
    columns = which % across * tile[1] + within % tile[1]
    return values.new_zeros(shape[0] * shape[1]).scatter(0, rows * shape[1] + columns, values).reshape(shape)
