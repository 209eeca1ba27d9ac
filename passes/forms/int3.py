"""Three-bit integer weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from recast.passes.forms.form import NamedForm
from recast.passes.forms.integer import Integer

__all__ = ["Int3"]


@dataclass(frozen=True)
class Int3(Integer):
    """``W[i, j] ≈ (code - zero) * scale`` with eight codes, three bits a value as stored; made for gptq and quantease.

    Notes
    -----
    Frantar et al., GPTQ (2022): groups of 128 inputs with a zero point each are the setting at three bits.

    Examples
    --------
    >>> import torch
    >>> Int3().fit(torch.randn(64, 128)).nbytes  # 64 x 48 of codes, 64 scales and zero points
    3392
    """

    name: ClassVar[str] = "int3"
    summary: ClassVar[str] = "3-bit integer weights in groups, packed; for rounding with the data"
    bits: ClassVar[int] = 3

    group: int | str = field(default=128, metadata={"help": "inputs that share a scale; 'tensor': the whole matrix"})
    symmetric: bool = field(
        default=False, metadata={"help": "true: the middle code is zero; else a zero point a group"}
    )

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(group=20), cls(rounding="quantease")]
