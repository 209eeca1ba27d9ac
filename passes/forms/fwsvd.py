"""FWSVD: the truncated SVD weighted by what a loss says about rows and columns of the weight."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.form import Form
from recast.passes.forms.linear_algebra import times
from recast.passes.forms.low_rank import LowRank, factors
from recast.passes.forms.stats import Stats
from recast.patterns.errors import CalibrationError, FormError, nearest

__all__ = ["FisherWeighted", "fisher_roots"]

_AXES = ("rows", "columns", "both")


@dataclass(frozen=True)
class FisherWeighted(LowRank):
    """W ≈ B A least in ``Σ_ij p_i q_j (W - B A)_ij²``: p sums the Fisher information of each row, q that of each column.

    F_ij is the mean squared gradient of a loss of yours; single weights for all entries have no closed form, so the paper
    weighs one axis (``rows``: the outputs, ``columns``: the inputs), the other being ones. ``both`` weighs the two.
    Statistics without importances are refused: gather them with ``recast.calibrate(program, batches, loss=...)``.

    Notes
    -----
    Hsu et al., Language model compression with weighted low-rank factorization (2022). Which axis its rows are differs
    between implementations.

    Examples
    --------
    >>> stats = Stats.from_inputs(torch.randn(20, 6))
    >>> from dataclasses import replace
    >>> stats = replace(stats, row_importance=torch.rand(8), column_importance=torch.rand(6))
    >>> FisherWeighted(rank=2).fit(torch.randn(8, 6), stats).nbytes
    112
    """

    name: ClassVar[str] = "fwsvd"
    summary: ClassVar[str] = "low rank by the SVD weighted with the Fisher information of rows (needs a loss)"
    # There is no fit without a loss to compare with.
    optimal_on_data: ClassVar[bool] = True

    axis: str = field(default="rows", metadata={"help": "what is weighted: 'rows' (outputs), 'columns' or 'both'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in _AXES:
            raise FormError(f"fwsvd: axis is {self.axis!r}; {nearest(self.axis, _AXES)}")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[LowRank]:  # type: ignore[override]
        return []  # none can be fitted to a weight alone

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[LowRank]:  # type: ignore[override]
        return []

    @property
    def needs_loss(self) -> bool:
        return True

    def solve(self, weight: Tensor, stats: Stats | None) -> Product:
        rows, columns = fisher_roots(self, weight, stats, rows=self.axis != "columns", columns=self.axis != "rows")
        wide = torch.promote_types(weight.dtype, torch.float32)
        scaled = weight.to(wide).mul(rows.to(wide)).mul_(columns.to(wide))
        left = self.subspace(scaled, None, self.rank_for((weight.shape[0], weight.shape[1])))
        return factors(left / rows, times(scaled.T, left).T / columns, weight.dtype)


def fisher_roots(
    form: Form, weight: Tensor, stats: Stats | None, *, rows: bool = True, columns: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the roots p (m, 1) and q (n,), float64, of a Fisher matrix ``p_i² q_j²`` of rank one, up to a factor.

    Parameters
    ----------
    form
        Who asks, for messages.
    weight, stats
        (m, n), and statistics with importances of its rows and columns.
    rows, columns
        False: ones in the place of p, or of q.

    Raises
    ------
    CalibrationError
        There are no importances, or they are of another weight.
    """
    if stats is None or stats.row_importance is None or stats.column_importance is None:
        found = "there are no statistics" if stats is None else "these statistics hold none"
        raise CalibrationError(
            f"{form}: importances of the weight's rows and columns are needed, {found}; "
            "recast.calibrate(program, batches, loss=...) gathers them from the gradients of a loss, which is Python: the command "
            "line has none"
        )
    if stats.row_importance.shape[0] != weight.shape[0]:
        name = getattr(form, "name", form)
        raise CalibrationError(
            f"{form}: importances of {stats.row_importance.shape[0]} rows, but the weight has {weight.shape[0]}; "
            f"{name} fits a whole weight, not what another form made of it"
        )
    p, q = (
        _root(stats.row_importance.to(weight.device), rows),
        _root(stats.column_importance.to(weight.device), columns),
    )
    return p.unsqueeze(1), q


def _root(importance: Tensor, used: bool) -> Tensor:
    wide = importance.double().clamp_min(0)
    if not used or not bool(wide.any()):
        return torch.ones_like(wide)
    # A row that no gradient reaches keeps a little weight, or it could not be scaled back.
    return (wide + 1e-6 * wide.mean()).sqrt()
