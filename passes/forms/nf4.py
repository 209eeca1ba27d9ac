"""Four-bit codes at the quantiles of a normal distribution."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.levels import Levels

__all__ = ["Nf2", "Nf3", "Nf4", "normal_table"]

# The share of the distribution within the outermost quantiles; half way between those of 15 and 16 steps a side.
_INSIDE = 1 - (1 / 30 + 1 / 32) / 2


@functools.cache
def _quantiles(bits: int) -> list[float]:
    import scipy.stats

    half = 2 ** (bits - 1)
    # Both sides hold zero: `half` steps up, `half - 1` down.
    up = scipy.stats.norm.ppf(torch.linspace(0.5, _INSIDE, half + 1, dtype=torch.float64).numpy())
    down = -scipy.stats.norm.ppf(torch.linspace(0.5, _INSIDE, half, dtype=torch.float64).numpy())
    ordered = sorted({*down.tolist(), *up.tolist(), 0.0})
    return [value / ordered[-1] + 0.0 for value in ordered]  # (+ 0.0 takes the sign of -0.0)


def normal_table(bits: int) -> Tensor:
    """Return the normal-float table of 2^bits values from -1 to 1, float64.

    Examples
    --------
    >>> [round(value, 4) for value in normal_table(3).tolist()]
    [-1.0, -0.4786, -0.2171, 0.0, 0.1609, 0.3379, 0.5626, 1.0]
    """
    return torch.tensor(_quantiles(bits), dtype=torch.float64)


@dataclass(frozen=True)
class _NormalFloat(Levels):
    bits: ClassVar[int]

    group: int | None = field(default=64, metadata={"help": "inputs that share a scale, their largest absolute value"})

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(group=64), cls(group=16), cls(group=4)]

    def table(self) -> Tensor:
        return normal_table(self.bits)


@dataclass(frozen=True)
class Nf4(_NormalFloat):
    """``W[i, j] ≈ table[code] * scale``: 16 levels at quantiles of a normal distribution, a scale for each 64 inputs.

    With ``double=true`` scales are eight-bit codes with a scale for each 256 of them: 4 + 8/64 + 32/(64·256) = 4.127 bits a
    value.

    Notes
    -----
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2023). Groups lie within a row, the last one may be shorter.

    Examples
    --------
    >>> weight = torch.randn(256, 1024)
    >>> [8 * Nf4(double=double).fit(weight).nbytes / weight.numel() for double in (False, True)]
    [4.501953125, 4.1290283203125]
    """

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "4-bit codes at quantiles of a normal distribution, a scale for each group"
    bits: ClassVar[int] = 4

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(group=16, double=True, rounding="gptq")]


@dataclass(frozen=True)
class Nf3(_NormalFloat):
    """``W[i, j] ≈ table[code] * scale``: as `nf4` with 8 levels, 3.127 bits a value with coded scales.

    Notes
    -----
    Guo et al., LQ-LoRA (2023), which takes normal floats of any width.

    Examples
    --------
    >>> len(set(Nf3().fit(torch.randn(1, 64)).to_dense().flatten().tolist())) <= 8
    True
    """

    name: ClassVar[str] = "nf3"
    summary: ClassVar[str] = "3-bit codes at quantiles of a normal distribution, a scale for each group"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Nf2(_NormalFloat):
    """``W[i, j] ≈ table[code] * scale``: as `nf4` with 4 levels, 2.127 bits a value with coded scales.

    Notes
    -----
    Guo et al., LQ-LoRA (2023), which takes normal floats of any width.

    Examples
    --------
    >>> Nf2().fit(torch.tensor([[1.0, -1.0, 0.1]])).to_dense().tolist()
    [[1.0, -1.0, 0.0]]
    """

    name: ClassVar[str] = "nf2"
    summary: ClassVar[str] = "2-bit codes at quantiles of a normal distribution, a scale for each group"
    bits: ClassVar[int] = 2
