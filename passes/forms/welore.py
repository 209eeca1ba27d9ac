"""WeLore: a rank for each weight from where its singular values fall below a threshold."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import output_gram
from recast.passes.forms.low_rank import LowRank
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["WeLore"]


@dataclass(frozen=True)
class WeLore(NamedForm):
    """Low rank with r = the number of singular values of at least `threshold` σ_1; dense where that cuts too little.

    One threshold for a whole model gives every weight the rank that its own spectrum asks for. The rank does not depend
    on data; with statistics the factors are those of `low_rank` at that rank.

    Notes
    -----
    Jaiswal et al., From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients (2024). For
    LLaMA-2-7B their thresholds 0.0225, 0.115, 0.175 and 0.26 cut 10, 30, 50 and 70 % in all.

    Examples
    --------
    >>> WeLore(0.5).fit(torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0]))).shape
    (4, 4)
    >>> [type(WeLore(t).fit(torch.diag(torch.tensor([4.0, 1, 1, 1])))).__name__ for t in (0.5, 0.1)]
    ['Product', 'Dense']
    """

    name: ClassVar[str] = "welore"
    summary: ClassVar[str] = "low rank where singular values fall below a share of the first, else dense"
    optimal_on_data: ClassVar[bool] = True

    threshold: float = field(metadata={"help": "share of the largest singular value that others are kept from"})
    least_cut: float = field(default=0.0, metadata={"help": "dense unless this share of the parameters is saved"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise FormError(f"welore: threshold is {self.threshold}, not in (0, 1]; 0.1 would work")
        if not 0 <= self.least_cut < 1:
            raise FormError(f"welore: least_cut is {self.least_cut}, not in [0, 1); 0.0 would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(0.3)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(threshold) for threshold in (0.9, 0.3, 1e-4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        return None  # the singular values decide

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        m, n = weight.shape
        values = torch.linalg.eigvalsh(output_gram(weight if m <= n else weight.T)).clamp_min(0).sqrt()
        rank = max(1, int((values >= self.threshold * values[-1]).sum())) if bool(values[-1] > 0) else 1
        if rank * (m + n) >= (1 - self.least_cut) * m * n:
            return Dense(weight)
        return LowRank(rank=rank).solve(weight, stats)
