"""Eight-bit floating point weights."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.floats import FloatGrid
from recast.passes.forms.form import NamedForm
from recast.passes.forms.levels import FloatLevels
from recast.patterns.errors import FormError

__all__ = ["Fp8"]

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_GRIDS = {"e4m3": FloatGrid(3, -6, 448.0), "e5m2": FloatGrid(2, -14, 57344.0)}


@dataclass(frozen=True)
class Fp8(FloatLevels):
    """``W[i, j] ≈ float8(code) * scale``, a scale for each row or group: its largest value is the largest of the format.

    Codes are the bytes of the format: ``e4m3`` (four exponent bits, three of mantissa, up to 448) or ``e5m2`` (up to
    57344). What the bytes mean is held once a weight as a table of 256 values, one KiB.

    With ``activations=true`` inputs are rounded to the format as well, over the range found as they come ("dynamic"): each
    vector has a scale of its own, its largest value being the largest of the format. `apply` is then linear only up to that
    rounding. No target has a product of the format yet; what it would give is computed in float32.

    Notes
    -----
    Micikevicius et al., FP8 Formats for Deep Learning (2022).

    Examples
    --------
    >>> operator = Fp8().fit(torch.tensor([[448.0, 3.3, -0.1]]))
    >>> operator.to_dense().tolist()
    [[448.0, 3.25, -0.1015625]]
    >>> operator.values.view(torch.float8_e4m3fn).float().tolist()
    [[448.0, 3.25, -0.1015625]]
    """

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit floats, a scale for each row or group; with activations=true inputs too"

    kind: str = field(default="e4m3", metadata={"help": "'e4m3' or 'e5m2'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _KINDS:
            raise FormError(f"fp8: kind is {self.kind!r}; 'e4m3' or 'e5m2' would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(), cls(activations=True), cls(group=16, kind="e5m2", activations=True)]

    def grid(self) -> FloatGrid:
        return _GRIDS[self.kind]

    def table(self) -> Tensor:
        kind = _KINDS[self.kind]
        largest = torch.finfo(kind).max
        values = torch.arange(256, dtype=torch.uint8).view(kind).double()
        # Codes for infinity and NaN are never chosen: they repeat zero, which comes first.
        return torch.where(torch.isfinite(values), values / largest, 0)
