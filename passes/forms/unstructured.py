"""Unstructured sparsity: values at any places, which a bitmap marks or which are held tile by tile."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.nm_sparse import check_damping
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.pruning import check_method, obs_prune, prunes_without_data, scores, top_of_all, top_of_groups
from recast.passes.forms.sparse import Sparse, reference
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, nearest

__all__ = ["STORAGES", "BitmapSparse", "TiledSparse", "Unstructured", "check_storage", "outline_scattered", "scattered"]

STORAGES = ("bitmap", "tiled")
# Rows and columns of a tile, as published; a place in a tile is a number of 16 bits.
_TILE, _PLACES = (128, 64), 2**15
# Columns that SparseGPT chooses from at a time.
_STEP = 128
_ROWS = 256


@dataclass(frozen=True, eq=False, repr=False)
class BitmapSparse(Sparse):
    """A weight (m, n) with values at the bits set in a bitmap.

    Attributes
    ----------
    values
        (1, k), the values in row-major order: an operator, so that they can be quantized.
    bitmap
        uint8 (m, ⌈n/8⌉), lowest bits first.
    features
        n.
    """

    kind: ClassVar[str] = "bitmap_sparse"
    values: Operator
    bitmap: Tensor
    features: int

    def __post_init__(self) -> None:
        width = reference.packed_bytes(self.features, 1)
        if self.bitmap.dim() != 2 or self.bitmap.shape[1] != width or self.bitmap.dtype != torch.uint8:
            raise ValueError(
                f"bitmap_sparse: the bitmap is {self.bitmap.dtype} {tuple(self.bitmap.shape)}, "
                f"uint8 (m, {width}) is needed"
            )
        if self.values.shape[0] != 1 or self.values.shape[1] > self.bitmap.shape[0] * self.features:
            raise ValueError(f"bitmap_sparse: values have shape {self.values.shape}, (1, number of bits set) is needed")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.bitmap.shape[0], self.features)

    def to_dense(self) -> Tensor:
        return reference.bitmap_to_dense(self.values.to_dense().reshape(-1), self.bitmap, self.features)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"bitmap": self.bitmap}

    def fields(self) -> dict[str, Any]:
        return {"features": self.features}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(children["values"], tensors["bitmap"], int(fields["features"]))


@dataclass(frozen=True, eq=False, repr=False)
class TiledSparse(Sparse):
    """A weight (m, n) with values at places of its tiles ("tiled CSL").

    Attributes
    ----------
    values
        (1, k), the values tile after tile, tiles and what is in them in row-major order: an operator, so that they can be
        quantized.
    places
        int16 (k,), the place of each in its tile.
    offsets
        int32, how many values are before each tile.
    full_shape
        (m, n).
    tile
        Rows and columns of a tile.
    """

    kind: ClassVar[str] = "tiled_sparse"
    values: Operator
    places: Tensor
    offsets: Tensor
    full_shape: tuple[int, int]
    tile: tuple[int, int] = _TILE

    def __post_init__(self) -> None:
        if min(*self.tile, *self.full_shape) < 1 or self.tile[0] * self.tile[1] > _PLACES:
            raise ValueError(f"tiled_sparse: tiles {self.tile} of {self.full_shape} make no sense")
        count = reference.tile_count(self.full_shape, self.tile)
        if self.values.shape[0] != 1:
            raise ValueError(f"tiled_sparse: values have shape {self.values.shape}, (1, number of places) is needed")
        needed = {"places": (torch.int16, (self.values.shape[1],)), "offsets": (torch.int32, (count,))}
        for name, (dtype, shape) in needed.items():
            held = getattr(self, name)
            if held.dtype != dtype or tuple(held.shape) != shape:
                raise ValueError(
                    f"tiled_sparse: {name} are {held.dtype} {tuple(held.shape)}, {dtype} {shape} is needed"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.full_shape

    def to_dense(self) -> Tensor:
        values = self.values.to_dense().reshape(-1)
        return reference.tiled_to_dense(values, self.places, self.offsets, shape=self.full_shape, tile=self.tile)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"places": self.places, "offsets": self.offsets}

    def fields(self) -> dict[str, Any]:
        return {"shape": list(self.full_shape), "tile": list(self.tile)}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        (m, n), (rows, columns) = fields["shape"], fields["tile"]
        shape, tile = (int(m), int(n)), (int(rows), int(columns))
        return cls(children["values"], tensors["places"], tensors["offsets"], shape, tile)


def check_storage(form: str, storage: str) -> None:
    """Raise FormError unless a storage is one there is."""
    if storage not in STORAGES:
        raise FormError(f"{form}: unknown storage {storage!r}; {nearest(storage, STORAGES)}")


def scattered(dense: Tensor, mask: Tensor, storage: str = "bitmap") -> BitmapSparse | TiledSparse:
    """Hold the values of a matrix (m, n) that a mask of its shape marks."""
    m, n = dense.shape
    if storage == "bitmap":
        # Slabs of rows, for places take eight bytes each while values are picked.
        picked = [rows[marks] for rows, marks in zip(dense.split(_ROWS), mask.split(_ROWS), strict=True)]  # type: ignore[no-untyped-call]
        return BitmapSparse(Dense(torch.cat(picked).reshape(1, -1)), reference.pack_bits(mask, 1), n)
    order, places, offsets = reference.tiled_pack(mask, _TILE)
    return TiledSparse(Dense(dense.reshape(1, -1)[:, order]), places, offsets, (m, n))


def outline_scattered(
    shape: tuple[int, int], count: int, dtype: torch.dtype, storage: str = "bitmap"
) -> BitmapSparse | TiledSparse:
    """Return what `scattered` makes of a mask that marks `count` values, on the meta device."""
    values = Dense(torch.empty(1, count, dtype=dtype, device="meta"))
    if storage == "bitmap":
        width = reference.packed_bytes(shape[1], 1)
        return BitmapSparse(values, torch.empty(shape[0], width, dtype=torch.uint8, device="meta"), shape[1])
    places = torch.empty(count, dtype=torch.int16, device="meta")
    offsets = torch.empty(reference.tile_count(shape, _TILE), dtype=torch.int32, device="meta")
    return TiledSparse(values, places, offsets, shape)


@dataclass(frozen=True)
class Unstructured(NamedForm):
    """``W' = W ⊙ M`` with a share `density` of the values kept, anywhere: those values, and where they are.

    Places are a bit for each there is (``storage='bitmap'``), or 16 bits for each that is kept and 4 bytes for every 128 x 64
    of them (``'tiled'``): fewer bytes below a density of 1/16.

    What is compared with what, by `method`: ``magnitude`` and ``nowag`` the whole matrix, ``wanda`` each row by itself,
    ``sparsegpt`` 128 columns at a time (see `Sparse24` for the scores). The number of kept values is always m times
    ``round(density n)``. In one shot: no schedule and no training between.

    Notes
    -----
    Zhu and Gupta, To prune, or not to prune (2017) count large sparse against small dense models; storage counts here
    too: with 16-bit values a bitmap breaks even at a density of 15/16, tiles at 1/2. Tiles are those of Xia et al., Flash-LLM:
    Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with Unstructured Sparsity (2023).

    Examples
    --------
    >>> Unstructured(0.25).fit(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).to_dense().tolist()
    [[0.0, -3.0, 0.0, 0.0]]
    >>> Unstructured(0.5).fit(torch.randn(64, 64)).nbytes  # 2048 values, 4096 bits
    8704
    >>> Unstructured(0.5, storage="tiled").fit(torch.randn(64, 64)).nbytes  # 2048 values and places, one tile
    12292
    """

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = (
        "values at any places, marked in a bitmap or held in tiles; pruned by size, Wanda, NoWag-P or SparseGPT"
    )

    density: float = field(metadata={"help": "share of the values that is kept"})
    method: str | None = field(
        default=None,
        metadata={
            "help": "'magnitude', 'wanda', 'nowag' or 'sparsegpt'; none: 'sparsegpt' with data, else 'magnitude'"
        },
    )
    damping: float = field(default=0.01, metadata={"help": "sparsegpt: added to the Gram matrix, share of its mean"})
    storage: str = field(
        default="bitmap", metadata={"help": "of the places: 'bitmap', or 'tiled', smaller below a density of 1/16"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise FormError(f"unstructured: density is {self.density}, not in (0, 1]; 0.5 would work")
        check_method("unstructured", self.method)
        check_damping("unstructured", self.damping)
        check_storage("unstructured", self.storage)

    @property
    def without_data(self) -> str | None:
        return prunes_without_data(self, self.method)

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(0.5), cls(0.3, "wanda"), cls(0.1, storage="tiled")]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(density) for density in (0.1, 0.3, 0.6, 0.9)]

    def kept(self, shape: tuple[int, int]) -> int:
        """Return how many values of a weight (m, n) are kept."""
        return shape[0] * int(self.density * shape[1] + 0.5)

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        if self.kept(shape):
            return None
        return f"keeps no value at density {self.density}", f"{-(-5000 // shape[1]) / 10000} or more would work"

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> BitmapSparse | TiledSparse:
        return outline_scattered(shape, self.kept(shape), dtype, self.storage)

    def solve(self, weight: Tensor, stats: Stats | None) -> BitmapSparse | TiledSparse:
        m, n = weight.shape
        total = self.kept((m, n))
        gram = None if stats is None else stats.gram
        method = self.method or ("magnitude" if gram is None else "sparsegpt")
        dense = weight
        if method == "sparsegpt" and gram is not None:

            def choose(saliency: Tensor, first: int) -> Tensor:
                last = first + len(saliency)
                return top_of_all(saliency, total * last // n - total * first // n)

            dense, mask = obs_prune(weight, gram, choose, _STEP, self.damping)
        elif method == "wanda":
            mask = top_of_groups(scores(weight, stats, method), total // m, n)
        else:
            mask = top_of_all(scores(weight, stats, "magnitude" if method == "sparsegpt" else method), total)
        return scattered(dense.to(weight.dtype), mask, self.storage)
