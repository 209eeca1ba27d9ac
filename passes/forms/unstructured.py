"""Unstructured sparsity: any places, marked in a bitmap."""
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
from recast.passes.forms.pruning import check_method, obs_prune, scores, top_of_all, top_of_groups
from recast.passes.forms.sparse import Sparse, reference
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["BitmapSparse", "Unstructured"]

# Columns that SparseGPT chooses from at a time.
_STEP = 128


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


@dataclass(frozen=True)
class Unstructured(NamedForm):
    """``W' = W ⊙ M`` with a share `density` of the values kept, anywhere: those values, and a bit for every place.

    What is compared with what, by `method`: ``magnitude`` and ``nowag`` the whole matrix, ``wanda`` each row by itself,
    ``sparsegpt`` 128 columns at a time (see `Sparse24` for the scores). The number of kept values is always m times
    ``round(density n)``. In one shot: no schedule and no training between.

    Notes
    -----
    Zhu and Gupta, To prune, or not to prune (2017) count large sparse against small dense models; storage counts here
    too: with 16-bit values it breaks even at a density of 15/16.

    Examples
    --------
    >>> Unstructured(0.25).fit(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).to_dense().tolist()
    [[0.0, -3.0, 0.0, 0.0]]
    >>> Unstructured(0.5).fit(torch.randn(64, 64)).nbytes  # 2048 values, 4096 bits
    8704
    """

    name: ClassVar[str] = "unstructured"
    summary: ClassVar[str] = "values at any places, marked in a bitmap; pruned by size, Wanda, NoWag-P or SparseGPT"

    density: float = field(metadata={"help": "share of the values that is kept"})
    method: str | None = field(
        default=None,
        metadata={
            "help": "'magnitude', 'wanda', 'nowag' or 'sparsegpt'; none: 'sparsegpt' with data, else 'magnitude'"
        },
    )
    damping: float = field(default=0.01, metadata={"help": "sparsegpt: added to the Gram matrix, share of its mean"})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise FormError(f"unstructured: density is {self.density}, not in (0, 1]; 0.5 would work")
        check_method("unstructured", self.method)
        check_damping("unstructured", self.damping)

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(0.5), cls(0.3, "wanda")]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(density) for density in (0.1, 0.3, 0.6, 0.9)]

    def kept(self, shape: tuple[int, int]) -> int:
        """Return how many values of a weight (m, n) are kept."""
        return shape[0] * int(self.density * shape[1] + 0.5)

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        if self.kept(shape):
            return None
        return f"keeps no value at density {self.density}", f"{-(-10000 // shape[1]) / 10000} or more would work"

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> BitmapSparse:
        m, n = shape
        values = torch.empty(1, self.kept(shape), dtype=dtype, device="meta")
        bitmap = torch.empty(m, reference.packed_bytes(n, 1), dtype=torch.uint8, device="meta")
        return BitmapSparse(Dense(values), bitmap, n)

    def solve(self, weight: Tensor, stats: Stats | None) -> BitmapSparse:
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
        values = dense.to(weight.dtype)[mask].reshape(1, total)
        return BitmapSparse(Dense(values), reference.pack_bits(mask, 1), n)
