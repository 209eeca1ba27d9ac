"""Inputs that matter are scaled up before a weight is rounded."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.form import NamedForm, data_error
from recast.passes.forms.operator import Operator
from recast.passes.forms.scaled import ScaledInputs, fit_scaled, input_size, outline_scaled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Awq"]

# Rows on which the powers are compared; all rows are compared with the unscaled fit in the end.
_ROWS = 512


@dataclass(frozen=True)
class Awq(ScaledInputs):
    """``W ≈ Q(W diag(s)) diag(1/s)`` with ``s_j = mean|x_j|^α`` and the α in [0, 1) of least error on the data.

    s is divided by the root of the product of its largest and smallest value. The division by s stays in front of the
    product, n multiplications a token. With ``shared=true`` sites that read the same input get one s, of powers of two, which a
    rewrite moves into what makes that input where it can.

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

    @property
    def without_data(self) -> str | None:
        return f"{self} rounds without looking for scales"

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(base="int3(group=16)", grid=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Product | None:
        return outline_scaled(self.inner(), shape, dtype)

    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        base = self.inner()
        pairs = list(zip(weights, stats, strict=True))
        ones = torch.ones(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)

        def scaled(scale: Tensor, given: Sequence[tuple[Tensor, Stats | None]]) -> list[Operator]:
            return [fit_scaled(base, weight, known, scale) for weight, known in given]

        def error(found: Sequence[Operator], given: Sequence[tuple[Tensor, Stats | None]] = pairs) -> float:
            return sum(data_error(w, operator, known) for operator, (w, known) in zip(found, given, strict=True))

        # All of them see the same.
        first = next((known for known in stats if known is not None and known.gram is not None), None)
        if first is None:
            return scaled(ones, pairs)
        size = input_size(first).to(weights[0].device)
        # An input that is never seen is scaled as the smallest one that is.
        seen = size > 0
        size = torch.where(seen, size, size[seen].min() if bool(seen.any()) else 1.0)
        some = [(weight[:: -(-weight.shape[0] // _ROWS)], known) for weight, known in pairs]
        best, least = ones, torch.inf
        for i in range(self.grid):
            scale = size ** (i / self.grid)
            scale = self.rounded(scale / (scale.max() * scale.min()).sqrt())
            lost = error(scaled(scale, some), some)
            if lost < least:
                best, least = scale, lost
        found, plain = scaled(best, pairs), scaled(ones, pairs)
        free = plain if base.optimal_on_data else scaled(ones, [(weight, None) for weight in weights])
        return min((found, plain, free), key=error)
