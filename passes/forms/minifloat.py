"""Floating point weights of any few bits, with an exponent bias that is searched for."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from recast.kernels.quantized_matmul.floats import FloatGrid
from recast.passes.forms.form import NamedForm
from recast.passes.forms.levels import SEARCHED, FloatLevels, float_levels
from recast.patterns.errors import FormError

__all__ = ["Minifloat"]


@dataclass(frozen=True)
class Minifloat(FloatLevels):
    """A sign, E exponent and M mantissa bits: ``± (1 + f/2^M) 2^(e - b)``, with a real bias b for each row or group.

    The bias says what the largest value is, ``(2 - 2^-M) 2^(2^E - 1 - b)``; a hundred choices of 0.01 to 1.2 times the
    largest value are tried, and the largest itself. The one of least squared error is kept, with data of least error of the
    output, group after group of a row; large weights then try the fewer that come nearest by the sizes of inputs alone.

    With ``activations=true`` inputs are rounded to the format as well, each vector over its own range, see `fp8`.

    Notes
    -----
    Liu et al., LLM-FP4: 4-Bit Floating-Point Quantized Transformers (2023). Their activations have a range from calibration,
    searched in turns with the weight's, and exponent biases of channels moved into the weight.

    Examples
    --------
    >>> import torch
    >>> weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    >>> searched, largest = (Minifloat(exponent=2, mantissa=1, search=search).fit(weight) for search in (True, False))
    >>> bool((searched.to_dense() - weight).norm() < (largest.to_dense() - weight).norm())
    True
    """

    name: ClassVar[str] = "minifloat"
    summary: ClassVar[str] = "floats of few bits, their exponent bias chosen for the least error"

    exponent: int = field(default=2, metadata={"help": "exponent bits, 1 to 5"})
    mantissa: int = field(default=1, metadata={"help": "mantissa bits, 0 to 6"})
    search: bool = field(default=True, metadata={"help": "false: the largest value of a group is the format's"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.exponent <= 5 and 0 <= self.mantissa <= 6 and self.exponent + self.mantissa <= 7):
            raise FormError(
                f"minifloat: {self.exponent} exponent and {self.mantissa} mantissa bits; 1 to 5, 0 to 6, together 7 at most "
                "would work, e.g. exponent=2, mantissa=1"
            )

    @classmethod
    def positional(cls, values: list[bool | int | float | str]) -> list[str]:
        # minifloat(2, 1) is E2M1.
        return ["exponent", "mantissa", "group"][: len(values)]

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(exponent=2, mantissa=2), cls(exponent=3, mantissa=0, search=False, activations=True)]

    def grid(self) -> FloatGrid:
        bias = 2 ** (self.exponent - 1) - 1
        return FloatGrid(self.mantissa, 1 - bias, (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1 - bias))

    def table(self) -> Tensor:
        return float_levels(self.exponent, self.mantissa)

    def tops(self) -> Sequence[float]:
        return SEARCHED if self.search else (1.0,)
