"""Two-bit integer weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from recast.passes.forms.form import NamedForm
from recast.passes.forms.integer import Integer

__all__ = ["Int2"]


@dataclass(frozen=True)
class Int2(Integer):
    """``W[i, j] ≈ (code - zero) * scale`` with four codes, four to a byte; too coarse alone, of use under ``+``.

    Notes
    -----
    Frantar et al., GPTQ (2022), go down to two bits with groups of 32 to 64 inputs and zero points.

    Examples
    --------
    >>> import torch
    >>> Int2().fit(torch.randn(64, 128)).nbytes  # 64 x 32 of codes, 128 scales and zero points
    2688
    """

    name: ClassVar[str] = "int2"
    summary: ClassVar[str] = "2-bit integer weights in groups, packed; with rounding='gptq' or something added to it"
    bits: ClassVar[int] = 2

    group: int | str = field(default=64, metadata={"help": "inputs that share a scale; 'tensor': the whole matrix"})
    symmetric: bool = field(
        default=False, metadata={"help": "true: the middle code is zero; else a zero point a group"}
    )

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls()]
