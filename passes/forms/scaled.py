"""What the forms that scale inputs share: a form fitted to ``W diag(s)``, behind ``diag(1/s)``."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product, RowStack
from recast.passes.forms.diagonal import Diagonal
from recast.passes.forms.form import Form, NamedForm, Together
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["OverBase", "ScaledInputs", "fit_scaled", "input_size", "scaled_rows", "scaled_stats", "without_scale"]

# Rows of a weight that are scaled at once.
_ROWS = 512


@dataclass(frozen=True)
class OverBase(NamedForm):
    """A named form over another one, given as text in the parameter `base`."""

    base: str

    def __post_init__(self) -> None:
        self.inner()

    def inner(self) -> Form:
        """Return the form that `base` says; raises FormError that names this form too."""
        try:
            return Form.parse(self.base)
        except FormError as error:
            raise FormError(f"{self.name}: base {self.base!r} cannot be read: {error}") from error

    @property
    def dense_leaves(self) -> bool:
        return False

    @property
    def needs_loss(self) -> bool:
        return self.inner().needs_loss

    @property
    def needs_data(self) -> bool:
        return self.inner().needs_data

    @property
    def fixed_point(self) -> bool:
        return False  # what is chosen around the base is chosen anew for what it made

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        super().check(shape, where)
        self.inner().check(shape, where)


@dataclass(frozen=True)
class ScaledInputs(OverBase, Together):
    """A form that divides inputs by a scale chosen on the data; sites that read the same input may share one.

    A scale that is shared is of powers of two, so that whatever makes the input can take it over without rounding anything anew.
    """

    shared: bool = field(
        default=False,
        kw_only=True,
        metadata={
            "help": "one scale, of powers of two, for all sites that read the same input, to be folded into its maker"
        },
    )

    @property
    def shared_part(self) -> Form | None:
        return self if self.shared else None

    def fit_together(
        self, weights: Sequence[Tensor], stats: Sequence[Stats | None], *, where: Sequence[str] | None = None
    ) -> list[Operator]:
        if not self.shared:
            return super().fit_together(weights, stats, where=where)
        checked = self.checked_together(weights, stats, where)
        return self.solve_together(checked, stats)

    def rounded(self, scale: Tensor) -> Tensor:
        """Return a scale as it is used: within what half precision holds, to the nearest power of two if it is shared."""
        scale = scale.clamp(1e-4, 1e4)
        return torch.exp2(torch.round(torch.log2(scale))) if self.shared else scale


def scaled_stats(stats: Stats, factor: Tensor) -> Stats:
    """Return the statistics of ``factor * x``, factor (n,)."""
    factor = factor.double()
    return replace(
        stats,
        gram=None if stats.gram is None else (stats.gram * factor.unsqueeze(1)).mul_(factor),
        mean=stats.mean * factor,
        absmax=stats.absmax * factor.abs(),
        sizes=None,
        ranges=None if stats.ranges is None else (stats.ranges * factor).sort(0).values,
        sample=None if stats.sample is None else (stats.sample.double() * factor).to(stats.sample.dtype),
    )


def input_size(stats: Stats) -> Tensor:
    """Return how large each input is on the data, (n,) float64: the mean of its size, from the sample where there is one.

    Without a sample it is the root of the mean square, which for inputs of one distribution is the same up to a factor.
    """
    if stats.sample is not None and len(stats.sample):
        return stats.sample.double().abs().mean(0)
    if stats.gram is not None:
        return (stats.gram.diagonal().clamp_min(0) / max(1, stats.tokens)).sqrt()
    return stats.absmax.double()


def fit_scaled(base: Form, weight: Tensor, stats: Stats | None, scale: Tensor) -> Product:
    """Fit ``W diag(s)`` and put ``diag(1/s)`` before it; scale (n,) positive."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # What is divided by is what is held.
    held = (1 / scale).to(weight.dtype)
    times = 1 / held.to(torch.float64)
    seen = None if stats is None else scaled_stats(stats, held)
    grown = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    for rows, out in zip(torch.split(wide, _ROWS), torch.split(grown, _ROWS), strict=True):
        torch.mul(rows, times, out=out)  # in float64, a few rows at a time, and only then rounded
    left: Operator = base.solve(grown, seen).to(weight.dtype)
    return Product(left, Diagonal(held, len(held), len(held)))


def outline_scaled(base: Form, shape: tuple[int, int], dtype: torch.dtype) -> Product | None:
    """Return what `fit_scaled` would make, on the meta device."""
    left = base.outline(shape, dtype)
    n = shape[1]
    return None if left is None else Product(left, Diagonal(torch.empty(n, dtype=dtype, device="meta"), n, n))


def without_scale(operator: Operator | None) -> tuple[Operator, Tensor] | None:
    """An operator without the square diagonal that its input meets first, and the diagonal; None if there is none.

    Examples
    --------
    >>> operator = Product(Dense(torch.ones(3, 2)), Diagonal(torch.tensor([1.0, 2.0]), 2, 2))
    >>> without_scale(operator)
    (Dense(weight=float32[3, 2]), tensor([1., 2.]))
    """
    if isinstance(operator, RowStack):
        parts = [without_scale(part) for part in operator.parts]
        taken = [part for part in parts if part is not None]
        if len(taken) < len(parts) or any(not torch.equal(scale, taken[0][1]) for _, scale in taken):
            return None
        return RowStack(tuple(left for left, _ in taken)), taken[0][1]
    if not isinstance(operator, Product) or not isinstance(operator.right, Diagonal):
        return None
    return (operator.left, operator.right.values) if operator.right.rows == operator.right.columns else None


def scaled_rows(operator: Operator, scale: Tensor) -> Operator | None:
    """``diag(scale) operator`` in the form that the operator has; None for forms that would need a factor of their own.

    Examples
    --------
    >>> scaled_rows(Dense(torch.ones(2, 2)), torch.tensor([1.0, 2.0])).to_dense()
    tensor([[1., 1.],
            [2., 2.]])
    """
    if isinstance(operator, Dense):
        return Dense(operator.weight * scale.to(operator.weight.dtype).unsqueeze(1))
    if isinstance(operator, Quantized):
        whole = operator.by_row()
        return replace(whole, scale=whole.scale * scale.to(whole.scale.dtype).unsqueeze(1))
    if isinstance(operator, Product):
        left = scaled_rows(operator.left, scale)
        return None if left is None else Product(left, operator.right)
    if isinstance(operator, RowStack):
        parts, at = [], 0
        for part in operator.parts:
            parts.append(scaled_rows(part, scale[at : at + part.shape[0]]))
            at += part.shape[0]
        known = [part for part in parts if part is not None]
        return RowStack(tuple(known)) if len(known) == len(parts) else None
    return None
