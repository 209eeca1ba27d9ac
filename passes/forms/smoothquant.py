"""Large inputs are divided, and the weight multiplied, before both are rounded."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.errors_of import measured_errors, predicted_errors
from recast.passes.forms.algebra import Product
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Operator
from recast.passes.forms.scaled import ScaledInputs, fit_scaled, outline_scaled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["SmoothQuant"]


@dataclass(frozen=True)
class SmoothQuant(ScaledInputs):
    """``W x ≈ Q(W diag(s)) Q(x / s)`` with ``s_j = max|x_j|^α / max|W_:,j|^(1-α)``: both are rounded, so both are made smooth.

    Inputs that are a hundred times larger than others, which would leave those no steps, hand a part of their size to the
    weight. Without data, or where the error with it is not smaller, s is 1.

    Notes
    -----
    Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (2022), α = 0.5.
    The division stays in front of the product. With ``shared=true`` sites that read the same input get one s, of powers of two,
    which a rewrite moves into what makes that input where it can.

    Examples
    --------
    >>> from recast.passes.forms import Stats
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(300, 64, generator=generator)
    >>> x[:, 7] *= 100
    >>> weight = torch.randn(32, 64, generator=generator)
    >>> operator = SmoothQuant().fit(weight, Stats.from_inputs(x, sample=300))
    >>> plain = SmoothQuant().fit(weight)
    >>> bool((operator.apply(x) - x @ weight.T).norm() < 0.5 * (plain.apply(x) - x @ weight.T).norm())
    True
    """

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = (
        "8-bit weights and activations after large inputs handed a part of their size to the weight"
    )
    # It is the error of rounded inputs that is compared, which the error of the weight does not show.
    optimal_on_data: ClassVar[bool] = True

    base: str = field(default="int8(activations=true)", metadata={"help": "the form of the scaled weight, as text"})
    alpha: float = field(default=0.5, metadata={"help": "how much of the inputs' size goes to the weight, 0 to 1"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise FormError(f"smoothquant: alpha is {self.alpha}, not in [0, 1]; 0.5 would work")

    @property
    def without_data(self) -> str | None:
        return f"{self} rounds without scales of inputs"

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Product | None:
        return outline_scaled(self.inner(), shape, dtype)

    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        base = self.inner()
        pairs = list(zip(weights, stats, strict=True))
        device = weights[0].device
        ones = torch.ones(weights[0].shape[1], dtype=torch.float64, device=device)
        plain: list[Operator] = [fit_scaled(base, weight, known, ones) for weight, known in pairs]
        if any(known is None for known in stats):
            return plain
        # Inputs are the same for all of them.
        top = torch.stack([known.absmax.to(device, torch.float64) for known in stats if known is not None]).amax(0)
        large = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
        # Where an input or its weights are all zero there is nothing to hand over.
        both = (top > 0) & (large > 0)
        scale = torch.where(both, top, 1) ** self.alpha / torch.where(both, large, 1) ** (1 - self.alpha)
        if bool(both.any()):
            # One factor for all changes nothing but where numbers overflow.
            scale = scale / (scale[both].max() * scale[both].min()).sqrt()
        scale = self.rounded(torch.where(both, scale, 1))
        smooth: list[Operator] = [fit_scaled(base, weight, known, scale) for weight, known in pairs]

        def error(found: Sequence[Operator]) -> float:
            lost = [_error(w, operator, s) ** 2 for operator, (w, s) in zip(found, pairs, strict=True) if s is not None]
            return sum(lost)

        return min((plain, smooth), key=error)


def _error(weight: Tensor, operator: Operator, stats: Stats) -> float:
    """Relative error with the rounding of inputs: measured on the sample, or without one predicted."""
    measured = measured_errors(weight, operator, stats)
    if measured is not None:
        return measured
    weight_error, output_error = predicted_errors(weight, operator, stats)
    return weight_error if output_error is None else output_error
