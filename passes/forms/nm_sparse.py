"""N of every M inputs: the operator, and the form for any N and M."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.pruning import check_method, obs_prune, prunes_without_data, scores, top_of_groups
from recast.passes.forms.sparse import Sparse, reference
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["NMSparse", "NMSparseForm", "fit_nm", "outline_nm", "pack_nm"]


@dataclass(frozen=True, eq=False, repr=False)
class NMSparse(Sparse):
    """A weight (m, n) with at most `keep` values in every `of` consecutive inputs of a row.

    Attributes
    ----------
    values
        The kept values (m, kept), in the order of their columns: an operator, so that they can be quantized.
    indices
        uint8, the place of each kept value in its group, packed (see `kernels.sparse_matmul`).
    keep, of
        N and M.
    features
        n.
    """

    kind: ClassVar[str] = "nm_sparse"
    values: Operator
    indices: Tensor
    keep: int
    of: int
    features: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of <= 256 or self.features < 1:
            raise ValueError(f"nm_sparse: {self.keep} of {self.of} of {self.features} inputs make no sense")
        m, kept = self.values.shape[0], reference.kept_count(self.features, self.keep, self.of)
        if self.values.shape[1] != kept:
            raise ValueError(f"nm_sparse: values have shape {self.values.shape}, {(m, kept)} is needed")
        packed = (m, reference.packed_bytes(kept, reference.index_bits(self.of)))
        if tuple(self.indices.shape) != packed or self.indices.dtype != torch.uint8:
            raise ValueError(
                f"nm_sparse: indices are {self.indices.dtype} {tuple(self.indices.shape)}, uint8 {packed} is needed"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.features)

    def to_dense(self) -> Tensor:
        return reference.nm_to_dense(
            self.values.to_dense(), self.indices, keep=self.keep, of=self.of, features=self.features
        )

    def mask(self) -> Tensor:
        """Return where values are kept, bool (m, n)."""
        ones = torch.ones(self.values.shape, device=self.indices.device)
        return reference.nm_to_dense(ones, self.indices, keep=self.keep, of=self.of, features=self.features) > 0

    def own_tensors(self) -> dict[str, Tensor]:
        return {"indices": self.indices}

    def fields(self) -> dict[str, Any]:
        return {"keep": self.keep, "of": self.of, "features": self.features}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        sizes = (int(fields["keep"]), int(fields["of"]), int(fields["features"]))
        return cls(children["values"], tensors["indices"], *sizes)

    def seen_by_values(self, stats: Stats) -> Stats | None:
        # The values of one column meet another input in each row: known is how much each of them weighs on average.
        if stats.gram is None:
            return None
        m, kept = self.values.shape
        energy = stats.gram.diagonal().to(self.indices.device, torch.float64)
        slots = energy.expand(m, -1)[self.mask()].reshape(m, kept).mean(0)
        return Stats.from_gram(torch.diag(slots), stats.tokens)


def fit_nm(weight: Tensor, stats: Stats | None, keep: int, of: int, method: str | None, damping: float) -> NMSparse:
    """Prune a weight to `keep` of `of`; see `Sparse24` for the methods."""
    gram = None if stats is None else stats.gram
    if method is None:
        method = "magnitude" if gram is None else "sparsegpt"
    dense = weight
    if method == "sparsegpt" and gram is not None:

        def choose(saliency: Tensor, first: int) -> Tensor:
            return top_of_groups(saliency.T, min(keep, len(saliency)), len(saliency)).T

        dense, mask = obs_prune(weight, gram, choose, of, damping)
    else:
        mask = top_of_groups(scores(weight, stats, "magnitude" if method == "sparsegpt" else method), keep, of)
    return pack_nm(dense.to(weight.dtype), mask, keep, of)


def pack_nm(weight: Tensor, mask: Tensor, keep: int, of: int) -> NMSparse:
    """Hold what a mask with `keep` of every `of` keeps of a weight."""
    values, indices = reference.nm_pack(weight, mask, keep, of)
    return NMSparse(Dense(values), indices, keep, of, weight.shape[1])


def outline_nm(shape: tuple[int, int], dtype: torch.dtype, keep: int, of: int) -> NMSparse:
    """Return what `fit_nm` would make, on the meta device."""
    m, n = shape
    kept = reference.kept_count(n, keep, of)
    packed = reference.packed_bytes(kept, reference.index_bits(of))
    values = torch.empty(m, kept, dtype=dtype, device="meta")
    return NMSparse(Dense(values), torch.empty(m, packed, dtype=torch.uint8, device="meta"), keep, of, n)


@dataclass(frozen=True)
class NMSparseForm(NamedForm):
    """At most `keep` values in every `of` consecutive inputs of a row: ``W' = W ⊙ M``, or with the rest refitted.

    Storage: ``keep / of`` of the values and ``⌈log2 of⌉`` bits for each of them. `Sparse24` is the case that hardware
    multiplies, and says what the methods do.

    Examples
    --------
    >>> form = NMSparseForm(1, 2)
    >>> form.fit(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).to_dense().tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    name: ClassVar[str] = "sparse_nm"
    summary: ClassVar[str] = "N of every M inputs of a row, packed; pruned by size, Wanda, NoWag-P or SparseGPT"

    keep: int = field(metadata={"help": "values kept in a group (N)"})
    of: int = field(metadata={"help": "inputs in a group (M)"})
    method: str | None = field(
        default=None,
        metadata={
            "help": "'magnitude', 'wanda', 'nowag' or 'sparsegpt'; none: 'sparsegpt' with data, else 'magnitude'"
        },
    )
    damping: float = field(default=0.01, metadata={"help": "sparsegpt: added to the Gram matrix, share of its mean"})

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of <= 256:
            raise FormError(
                f"sparse_nm: {self.keep} of {self.of} is no pattern; 2 of 4, or up to 255 of 256, would work"
            )
        check_method("sparse_nm", self.method)
        check_damping("sparse_nm", self.damping)

    @property
    def without_data(self) -> str | None:
        return prunes_without_data(self, self.method)

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(5, 8, "nowag")]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(1, 8), cls(2, 8), cls(4, 8), cls(7, 8)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> NMSparse:
        return outline_nm(shape, dtype, self.keep, self.of)

    def solve(self, weight: Tensor, stats: Stats | None) -> NMSparse:
        return fit_nm(weight, stats, self.keep, self.of, self.method, self.damping)


def check_damping(form: str, damping: float) -> None:
    """Raise FormError unless a damping is a positive number."""
    if not 0 < damping < float("inf"):
        raise FormError(f"{form}: damping is {damping}, not positive; 0.01 would work")
