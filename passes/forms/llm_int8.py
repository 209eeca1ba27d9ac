"""A few large inputs are kept out of the rounding."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.scaled import OverBase
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["LlmInt8"]


@dataclass(frozen=True)
class LlmInt8(OverBase):
    """``W x ≈ Q(W_R) Q(x_R) + W_O x_O``: inputs O that reach `threshold` on the data stay as they are, the rest R is rounded.

    Which inputs these are is decided once, from calibration, and not for each batch. Without data there are none.

    Notes
    -----
    Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (2022), with its threshold of 6. There
    the range of a token is symmetric, here it has a zero point.

    Examples
    --------
    >>> from recast.passes.forms import Stats
    >>> x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    >>> x[:, 7] *= 100
    >>> operator = LlmInt8().fit(torch.randn(32, 64), Stats.from_inputs(x))
    >>> operator.parts[1].columns.tolist()
    [7]
    """

    name: ClassVar[str] = "llm_int8"
    summary: ClassVar[str] = "8-bit weights and activations but for the inputs that are large on the data"
    # Fewer columns are rounded, and the others' scales are no larger.
    optimal_on_data: ClassVar[bool] = True

    base: str = field(default="int8(activations=true)", metadata={"help": "the form of what is rounded, as text"})
    threshold: float = field(default=6.0, metadata={"help": "inputs whose largest value reaches it stay as they are"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise FormError(f"llm_int8: threshold is {self.threshold}, not positive; 6.0 would work")

    @property
    def without_data(self) -> str | None:
        return f"{self} takes no input for large"

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        return None  # how many inputs are large is for the data to say

    def solve(self, weight: Tensor, stats: Stats | None) -> Sum:
        n = weight.shape[1]
        base = self.inner()
        large = torch.zeros(n, dtype=torch.bool)
        if stats is not None:
            large = stats.absmax.cpu() >= self.threshold
        if not bool(large.any()):
            return Sum((base.solve(weight, stats),))
        parts: list[Operator] = []
        for rounded in (True, False):
            places = (large != rounded).nonzero()[:, 0]
            if not len(places):
                continue
            own = weight[:, places.to(weight.device)].contiguous()
            values = base.solve(own, _part(stats, places)) if rounded else Dense(own)
            parts.append(ColumnSparse(values, places.to(weight.device, torch.int32), n))
        return Sum(tuple(parts))


def _part(stats: Stats | None, places: Tensor) -> Stats | None:
    if stats is None:
        return None
    return replace(
        stats,
        gram=None if stats.gram is None else stats.gram[places][:, places],
        mean=stats.mean[places],
        absmax=stats.absmax[places],
        sizes=None,
        ranges=None if stats.ranges is None else stats.ranges[:, places],
        sample=None if stats.sample is None else stats.sample[:, places],
    )
