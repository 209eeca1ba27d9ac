"""ASVD: the truncated SVD of a weight whose columns are scaled by the size of their inputs."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.linear_algebra import times
from recast.passes.forms.low_rank import LowRank, factors
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["ActivationScaled"]


@dataclass(frozen=True)
class ActivationScaled(LowRank):
    """W ≈ B A, the truncated SVD of W S with S = diag(a^α) taken off again: a_j is the mean ``abs(x_j)`` of input j.

    It sees how large inputs are and not how they vary together, so `low_rank`, which sees both, is better on the data; it
    is here to be compared with. Without statistics, the plain SVD. a_j is taken from the sample of inputs that statistics
    carry, or else, for inputs of normal distribution, from their second moments.

    Notes
    -----
    Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models (2023), with
    their α of a half.

    Examples
    --------
    >>> ActivationScaled(rank=2).fit(torch.randn(8, 6), Stats.from_inputs(torch.randn(20, 6))).nbytes
    112
    """

    name: ClassVar[str] = "asvd"
    summary: ClassVar[str] = "low rank by the SVD with inputs scaled by their mean size"
    optimal_on_data: ClassVar[bool] = False

    alpha: float = field(default=0.5, metadata={"help": "exponent of the mean sizes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 4:
            raise FormError(f"asvd: alpha is {self.alpha}, not in [0, 4]; 0.5 would work")

    @property
    def without_data(self) -> str | None:
        return f"{self} is a plain truncated SVD"

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[LowRank]:  # type: ignore[override]
        return [cls(rank=max(1, min(shape) // 4))]

    def solve(self, weight: Tensor, stats: Stats | None) -> Product:
        scale = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if stats is not None:
            size = mean_size(stats).to(weight.device)
            # A feature that is never seen keeps a little weight, or its column could not be scaled back.
            scale = torch.where(size.any(), size + 1e-6 * size.mean(), 1).pow(self.alpha)
        wide = torch.promote_types(weight.dtype, torch.float32)
        scaled = weight.to(wide) * scale.to(wide)
        left = self.subspace(scaled, None, self.rank_for((weight.shape[0], weight.shape[1])))
        return factors(left, times(scaled.T, left).T / scale, weight.dtype)


def mean_size(stats: Stats) -> Tensor:
    """Return the mean ``abs(x)`` of each feature, (n,) float64."""
    if stats.sample is not None and len(stats.sample):
        return stats.sample.double().abs().mean(0)
    if stats.gram is not None:
        return (stats.gram.diagonal().double().clamp_min(0) / max(1, stats.tokens) * 2 / math.pi).sqrt()
    return stats.absmax.double()
