"""A quantized and a low-rank term that take turns."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.form import NamedForm, data_error
from recast.passes.forms.lorc import Corrected
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Lq"]


@dataclass(frozen=True)
class Lq(Corrected):
    """``W ≈ Q + L1 L2``: in turns the base form of ``W - L1 L2`` and the best low-rank term for ``W - Q``.

    Turns begin with ``L1 L2`` the best for W, and once more with none (`lorc`, which this is never worse than); they end
    when the error rises, and the best pair is kept. With data the errors of both steps are weighted by it.

    Notes
    -----
    Guo et al., LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning (2023), with its
    rank of 64 and at most a hundred turns. Theirs weighs by a rank-one Fisher matrix, here it is the Gram matrix of the
    inputs; theirs keeps the low-rank term that Q was made for, here it is solved for once more.

    Examples
    --------
    >>> weight = torch.randn(64, 64) + 3 * torch.randn(64, 1) @ torch.randn(1, 64)
    >>> plain, corrected = Lq(rank=1).inner().fit(weight), Lq(rank=4).fit(weight)
    >>> bool((corrected.to_dense() - weight).norm() < 0.8 * (plain.to_dense() - weight).norm())
    True
    """

    name: ClassVar[str] = "lq"
    summary: ClassVar[str] = "quantized plus low rank, fitted in turns; the start of LQ-LoRA"

    base: str = field(default="nf4(double=true)", metadata={"help": "the form of the quantized term, as text"})
    rank: int = field(default=64, metadata={"help": "inner size of the low-rank term"})
    turns: int = field(default=100, metadata={"help": "at most so many"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise FormError(f"lq: turns is {self.turns}, not positive; 100 would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(rank=1, base="nf3", turns=5)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [
            cls(base="nf4", rank=form.rank, turns=5) for form in super().ladder(shape) if isinstance(form, Corrected)
        ]

    def solve(self, weight: Tensor, stats: Stats | None) -> Sum:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        base = self.inner()
        best, least = None, torch.inf
        for start in (None, self.correction(weight, wide, stats)):
            low, last = start, torch.inf
            for _ in range(self.turns):
                rest = wide if low is None else wide - low.to_dense().to(wide.dtype)
                first = base.solve(rest, stats).to(weight.dtype)
                low = self.correction(weight, wide - first.to_dense().to(wide.dtype), stats)
                found = Sum((first, low))
                error = data_error(weight, found, stats)
                if best is None or error < least:
                    best, least = found, error
                if not error < last:
                    break
                last = error
        assert best is not None  # there is at least one turn
        return best
