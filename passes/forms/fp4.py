"""Four-bit floating point weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.floats import FloatGrid
from recast.passes.forms.form import NamedForm
from recast.passes.forms.levels import SEARCHED, FloatLevels, float_levels
from recast.patterns.errors import FormError

__all__ = ["Fp4"]

# Magnitudes of the codes 0..7; 8..15 are their negatives.
_BITSANDBYTES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class Fp4(FloatLevels):
    """``W[i, j] ≈ table[code] * scale`` with the 16 values of a four-bit float, a scale for each group.

    There are two such floats: ``e2m1``, two exponent bits and one of mantissa (0, 0.5, 1, 1.5, 2, 3, 4, 6), as MXFP4 and NVFP4
    have it; and the one of the package bitsandbytes (0, 0.0625, 2, 3, 4, 6, 8, 12, its codes in another order).

    With ``activations=true`` inputs are rounded to e2m1 as well, each vector over its own range, see `fp8`. With
    ``search=true`` the largest value of a group need not be the largest of the format: what errs least is searched for, as
    `minifloat` does.

    Notes
    -----
    Rouhani et al., Microscaling Data Formats for Deep Learning (2023); Dettmers et al., QLoRA (2023).

    Examples
    --------
    >>> weight = torch.tensor([[6.0, 3.2, 0.3, -1.1]])
    >>> Fp4().fit(weight).to_dense()
    tensor([[ 6.0000,  3.0000,  0.5000, -1.0000]])
    >>> Fp4(kind="bitsandbytes").fit(2 * weight).to_dense()
    tensor([[12.0000,  6.0000,  0.0625, -2.0000]])
    """

    name: ClassVar[str] = "fp4"
    summary: ClassVar[str] = "4-bit floats, a scale for each group; with activations=true inputs too"

    group: int | None = field(default=64, metadata={"help": "inputs that share a scale, from their largest value"})
    kind: str = field(default="e2m1", metadata={"help": "'e2m1' or 'bitsandbytes'"})

    search: bool = field(
        default=False, kw_only=True, metadata={"help": "try a hundred largest values for each group, see minifloat"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("e2m1", "bitsandbytes"):
            raise FormError(f"fp4: kind is {self.kind!r}; 'e2m1' or 'bitsandbytes' would work")
        if self.activations and self.kind != "e2m1":
            raise FormError(f"fp4: inputs are rounded to a float format, which {self.kind!r} is not; 'e2m1' would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(kind="bitsandbytes"), cls(activations=True), cls(group=20, search=True)]

    def grid(self) -> FloatGrid:
        return FloatGrid(1, 0, 6.0)

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        # Levels are uneven, so that near group sizes may change places by chance; far ones do not.
        return [cls(group=64), cls(group=4)]

    def tops(self) -> Sequence[float]:
        return SEARCHED if self.search else (1.0,)

    def table(self) -> Tensor:
        if self.kind == "e2m1":
            return float_levels(2, 1)
        magnitude = torch.tensor(_BITSANDBYTES, dtype=torch.float64) / max(_BITSANDBYTES)
        return torch.cat([magnitude, -magnitude])
