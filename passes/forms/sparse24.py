"""Two of every four inputs: the sparsity that hardware multiplies."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.nm_sparse import NMSparse, check_damping, fit_nm, outline_nm
from recast.passes.forms.pruning import check_method, prunes_without_data
from recast.passes.forms.stats import Stats

__all__ = ["Sparse24"]


@dataclass(frozen=True)
class Sparse24(NamedForm):
    """2:4 sparsity, ``W' = W ⊙ M`` with two of every four inputs of a row kept: half of the values and 2 bits for each.

    The values to keep, by `method`:

    - ``magnitude``: the largest ``|w|``. The default without data.
    - ``wanda``: the largest ``|w| ‖X_j‖``; nothing else changes.
    - ``nowag``: the largest ``w̄² ‖X_j‖²``, w̄ being divided by the norm of its column, then of its row.
    - ``sparsegpt``: the least harm ``w² / [H⁻¹]_jj`` column by column, H the damped Gram matrix, and the columns that
      follow take over what was pruned. The default with data: on correlated inputs the most exact of the four.

    Each method without data is what it is for uncorrelated inputs of equal size; SparseGPT is then magnitude.

    Notes
    -----
    Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda, 2023); Frantar and Alistarh,
    SparseGPT (2023); Liu et al., NoWag (2025).

    Examples
    --------
    >>> operator = Sparse24().fit(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> operator.to_dense().tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    >>> weight = torch.randn(64, 64, dtype=torch.bfloat16)
    >>> Sparse24().fit(weight).nbytes / weight.nbytes  # 9/16
    0.5625
    """

    name: ClassVar[str] = "sparse24"
    summary: ClassVar[str] = "two of every four inputs of a row, packed; pruned by size, Wanda, NoWag-P or SparseGPT"

    method: str | None = field(
        default=None,
        metadata={
            "help": "'magnitude', 'wanda', 'nowag' or 'sparsegpt'; none: 'sparsegpt' with data, else 'magnitude'"
        },
    )
    damping: float = field(default=0.01, metadata={"help": "sparsegpt: added to the Gram matrix, share of its mean"})

    def __post_init__(self) -> None:
        check_method("sparse24", self.method)
        check_damping("sparse24", self.damping)

    @property
    def without_data(self) -> str | None:
        return prunes_without_data(self, self.method)

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(method="wanda")]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> NMSparse:
        return outline_nm(shape, dtype, 2, 4)

    def solve(self, weight: Tensor, stats: Stats | None) -> NMSparse:
        return fit_nm(weight, stats, 2, 4, self.method, self.damping)
