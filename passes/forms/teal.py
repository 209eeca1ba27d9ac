"""Gating by the size of an input."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast.passes.forms.gated import Gating
from recast.passes.forms.stats import Stats

__all__ = ["Teal"]


@dataclass(frozen=True)
class Teal(Gating):
    """``y = W (x ⊙ [|x| > t])`` with one t, which the share `sparsity` of all inputs on the data does not exceed.

    A token may keep more or fewer inputs than another. Without data, whose size nothing then tells, each token keeps the same
    number, its largest: that share is right whatever the inputs are distributed like.

    Notes
    -----
    Liu et al., Training-Free Activation Sparsity in Large Language Models (2024), without the search for a share for each
    matrix, which a budget over candidates is.

    Examples
    --------
    >>> import torch
    >>> stats = Stats.from_inputs(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    >>> operator = Teal(0.5).fit(torch.ones(1, 2), stats)
    >>> operator.mask(torch.tensor([[1.0, 2.0], [-3.9, 9.0]])).tolist()
    [[False, False], [True, True]]
    """

    name: ClassVar[str] = "teal"
    summary: ClassVar[str] = "inputs below a threshold are left out, token by token"
    weighted: ClassVar[bool] = False

    def threshold(self, stats: Stats | None) -> float | None:
        return None if stats is None else stats.size_at(self.sparsity)
