"""Inputs that matter are scaled up before a weight is rounded."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.form import NamedForm, data_error
from recast.passes.forms.scaled import OverBase, fit_scaled, input_size, outline_scaled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Awq"]

# Rows on which the powers are compared; all rows are compared with the unscaled fit in the end.
_ROWS = 512


@dataclass(frozen=True)
class Awq(OverBase):
    """``W ≈ Q(W diag(s)) diag(1/s)`` with ``s_j = mean|x_j|^α`` and the α in [0, 1) of least error on the data.

    s is divided by the root of the product of its largest and smallest value. The division by s stays in front of the
    product, n multiplications a token, where nothing before it can take it over.

    Notes
    -----
    Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (2023). Powers 0, 1/20, ...,
    19/20 and groups of 128 with zero points are theirs; clipping is the base's own search of scales. Any
    rounding goes with it, GPTQ too.

    Examples
    --------
    >>> from recast.passes.forms import Stats, relative_error
    >>> from recast.passes.forms.form import Form
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(300, 64, generator=generator) * torch.where(torch.arange(64) % 16 == 3, 20.0, 1.0)
    >>> weight, stats = torch.randn(32, 64, generator=generator), Stats.from_inputs(x)
    >>> plain, scaled = (Form.parse(text).fit(weight, stats) for text in ("int3", "awq('int3')"))
    >>> relative_error(weight, scaled, stats)[1] < 0.9 * relative_error(weight, plain, stats)[1]
    True
    """

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "quantized after inputs that matter were scaled up"
    # The unscaled fit, which never loses by the data, is one of those compared.
    optimal_on_data: ClassVar[bool] = True

    base: str = field(
        default="int4(group=128, symmetric=false)", metadata={"help": "the form of the scaled weight, as text"}
    )
    grid: int = field(default=20, metadata={"help": "how many powers of the inputs' size are tried"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise FormError(f"awq: grid is {self.grid}, not positive; 20 would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(base="int3(group=16)", grid=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Product | None:
        return outline_scaled(self.inner(), shape, dtype)

    def solve(self, weight: Tensor, stats: Stats | None) -> Product:
        base = self.inner()
        ones = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if stats is None or stats.gram is None:
            return fit_scaled(base, weight, stats, ones)
        size = input_size(stats).to(weight.device)
        # An input that is never seen is scaled as the smallest one that is.
        seen = size > 0
        size = torch.where(seen, size, size[seen].min() if bool(seen.any()) else 1.0)
        step = -(-weight.shape[0] // _ROWS)
        some = weight[::step]
        best, least = ones, torch.inf
        for i in range(self.grid):
            scale = size ** (i / self.grid)
            scale = scale / (scale.max() * scale.min()).sqrt()
            # Half precision holds what is divided by.
            scale = scale.clamp(1e-4, 1e4)
            error = data_error(some, fit_scaled(base, some, stats, scale), stats)
            if error < least:
                best, least = scale, error
        found = fit_scaled(base, weight, stats, best)
        plain = fit_scaled(base, weight, stats, ones)
        free = plain if base.optimal_on_data else fit_scaled(base, weight, None, ones)
        return min((found, plain, free), key=lambda operator: data_error(weight, operator, stats))
