"""A quantized and a low-rank term that take turns."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.form import NamedForm, data_error
from recast.passes.forms.fwsvd import FisherWeighted, fisher_roots
from recast.passes.forms.lorc import Corrected
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, nearest

__all__ = ["Lq"]

_WEIGHTINGS = ("data", "fisher")


@dataclass(frozen=True)
class Lq(Corrected):
    """``W ≈ Q + L1 L2``: in turns the base form of ``W - L1 L2`` and the best low-rank term for ``W - Q``.

    Turns begin with ``L1 L2`` the best for W, and once more with none (`lorc`, which this is never worse than); they end
    when the error rises, and the best pair is kept. With data the errors of both steps are weighted by it.

    With ``weighting='fisher'`` all of it is weighted by the Fisher information that a loss of yours has about the weight, as if
    that were of rank one: errors are ``Σ_ij p_i q_j (W - Ŵ)_ij²``, p and q the means of the squared gradients of each row and
    each column. The low-rank term is the truncated SVD of ``diag(√p) (W - Q) diag(√q)``, scaled back; Q sees q as the sizes of
    its inputs (which of the base forms use: roundings and searches do, levels alone do not). Statistics without importances
    are refused: gather them with ``recast.calibrate(program, batches, loss=...)``.

    Notes
    -----
    Guo et al., LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning (2023), with its
    rank of 64 and at most a hundred turns. Theirs weighs by the Fisher matrix and leaves Q unweighted; theirs keeps the
    low-rank term that Q was made for, here it is solved for once more.

    Examples
    --------
    >>> weight = torch.randn(64, 64) + 3 * torch.randn(64, 1) @ torch.randn(1, 64)
    >>> plain, corrected = Lq(rank=1).inner().fit(weight), Lq(rank=4).fit(weight)
    >>> bool((corrected.to_dense() - weight).norm() < 0.8 * (plain.to_dense() - weight).norm())
    True
    >>> fisher = torch.outer(torch.rand(64) ** 4, torch.rand(64) ** 4)
    >>> stats = Stats.from_inputs(torch.randn(99, 64))
    >>> stats = replace(stats, row_importance=fisher.sum(1), column_importance=fisher.sum(0))
    >>> weighted = Lq(rank=4, weighting="fisher").fit(weight, stats)
    >>> gaps = [(operator.to_dense() - weight).square() for operator in (corrected, weighted)]
    >>> bool((fisher * gaps[1]).sum() < 0.9 * (fisher * gaps[0]).sum())
    True
    """

    name: ClassVar[str] = "lq"
    summary: ClassVar[str] = "quantized plus low rank, fitted in turns; the start of LQ-LoRA"

    base: str = field(default="nf4(double=true)", metadata={"help": "the form of the quantized term, as text"})
    rank: int = field(default=64, metadata={"help": "inner size of the low-rank term"})
    turns: int = field(default=100, metadata={"help": "at most so many"})
    weighting: str = field(
        default="data", metadata={"help": "of errors: 'data' (the inputs, where known) or 'fisher' (needs a loss)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise FormError(f"lq: turns is {self.turns}, not positive; 100 would work")
        if self.weighting not in _WEIGHTINGS:
            raise FormError(f"lq: weighting is {self.weighting!r}; {nearest(self.weighting, _WEIGHTINGS)}")

    @property
    def needs_loss(self) -> bool:
        return self.weighting == "fisher" or super().needs_loss

    @property
    def needs_data(self) -> bool:
        return self.needs_loss or super().needs_data

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(rank=1, base="nf3", turns=5)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [
            cls(base="nf4", rank=form.rank, turns=5) for form in super().ladder(shape) if isinstance(form, Corrected)
        ]

    def solve(self, weight: Tensor, stats: Stats | None) -> Sum:
        if self.weighting == "data":
            return self._turns(weight, stats, lambda found: data_error(weight, found, stats))
        rows, columns = fisher_roots(self, weight, stats)

        def error(found: Operator) -> float:
            gap = weight.double() - found.to_dense().double()
            return float((gap * rows * columns).square().sum())

        assert stats is not None  # there are importances
        return self._turns(weight, replace(stats, gram=torch.diag(columns.square()), cross=None), error)

    def correction(self, weight: Tensor, rest: Tensor, stats: Stats | None) -> Operator:
        if self.weighting == "data":
            return super().correction(weight, rest, stats)
        return FisherWeighted(rank=self.rank, axis="both").solve(rest, stats).to(weight.dtype)

    def _turns(self, weight: Tensor, stats: Stats | None, error: Callable[[Operator], float]) -> Sum:
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
                reached = error(found)
                if best is None or reached < least:
                    best, least = found, reached
                if not reached < last:
                    break
                last = reached
        assert best is not None  # there is at least one turn
        return best
