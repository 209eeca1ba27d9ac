"""Eight-bit integer weights, and eight-bit activations with them."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.integer import TENSOR, check_group, check_rounding, inputs_of_group, rounds_without_data
from recast.passes.forms.quantized import Quantized, outline_quantized
from recast.passes.forms.quantized_fit import fit_quantized
from recast.passes.forms.static_inputs import static_grid
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8(NamedForm):
    """One byte a value, a scale for each output channel, for each group of its inputs, or for the whole matrix.

    With ``activations=true`` inputs are rounded to int8 as well, over the range found as they come ("dynamic"), and the
    product runs on integers; `apply` is then linear only up to that rounding. Each vector has a scale and zero point of its
    own, or with ``per_token=false`` all share one pair, as ONNX's DynamicQuantizeLinear. ``reduce_range=true`` keeps the
    weight's codes within -64..64, for x86 without VNNI, whose int8 product would saturate.

    With ``static=true`` that one pair is chosen beforehand, from the range that inputs had in calibration, without which there
    is no fit; what is beyond it is cut off. It is what OpenVINO, TensorRT, QNN and DirectML turn into products of integers
    (``docs/onnx-kernels.md``).

    Examples
    --------
    >>> Int8().fit(torch.tensor([[1.0, -0.5]])).values.tolist()
    [[127, -64]]
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "8-bit integer weights; with activations=true inputs too, rounded token by token"
    # Scales come from the largest value alone, data or none.
    optimal_on_data: ClassVar[bool] = True  # (with reduce_range the fit itself keeps the better scales, row by row)

    group: int | str | None = field(
        default=None, metadata={"help": "inputs that share a scale; none: a whole row, 'tensor': the whole matrix"}
    )
    activations: bool = field(default=False, metadata={"help": "round each input vector to int8 as well"})
    per_token: bool = field(
        default=True, metadata={"help": "with activations: a scale for each vector, not one for all"}
    )
    static: bool = field(
        default=False, metadata={"help": "with activations: one scale for all vectors, chosen in calibration"}
    )
    zero_point: bool = field(
        default=True, metadata={"help": "with static: a zero point too; false for TensorRT, which has none"}
    )
    reduce_range: bool = field(default=False, metadata={"help": "codes within -64..64, exact without VNNI"})
    symmetric: bool = field(default=True, metadata={"help": "zero is code 0; false: a zero point for each group"})
    rounding: str = field(default="nearest", metadata={"help": "'nearest', or with data 'gptq' or 'quantease'"})
    act_order: bool = field(default=False, metadata={"help": "gptq: round inputs of the largest mean square first"})

    def __post_init__(self) -> None:
        check_group("int8", self.group, 128)
        if not (self.per_token or self.activations):
            raise FormError("int8: per_token=false speaks of activations, which are left alone; add activations=true")
        if self.static and not self.activations:
            raise FormError("int8: static=true speaks of activations, which are left alone; add activations=true")
        if not (self.zero_point or self.static):
            raise FormError("int8: zero_point=false speaks of a scale chosen in calibration; add static=true")
        if self.static:
            object.__setattr__(self, "per_token", False)  # one scale for all is what it means
        if self.reduce_range and not self.symmetric:
            raise FormError("int8: reduce_range goes with symmetric codes; leave symmetric=false out")
        check_rounding("int8", self.rounding, self.act_order)

    @property
    def needs_data(self) -> bool:
        return self.static

    @property
    def without_data(self) -> str | None:
        return rounds_without_data(self, self.rounding)

    @property
    def dense_leaves(self) -> bool:
        return False

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [
            cls(),
            cls(group=16),
            cls(symmetric=False),
            cls(activations=True),
            cls(group=16, activations=True),
            cls(activations=True, symmetric=False),
            cls(activations=True, per_token=False, reduce_range=True),
            cls(group=TENSOR),
            cls(group=TENSOR, activations=True, symmetric=False),
        ]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(group=TENSOR), cls(), cls(group=16), cls(group=4)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Quantized:
        return outline_quantized(
            shape,
            dtype,
            bits=8,
            group=inputs_of_group(self.group),
            per_tensor=self.group == TENSOR,
            symmetric=self.symmetric,
            activations=self.activations,
            per_token=self.per_token,
            static=self.static,
        )

    def solve(self, weight: Tensor, stats: Stats | None) -> Quantized:
        grid = static_grid(str(self), stats, self.zero_point) if self.static else (None, None)
        made = fit_quantized(
            weight,
            stats,
            bits=8,
            group=inputs_of_group(self.group),
            per_tensor=self.group == TENSOR,
            symmetric=self.symmetric,
            reduce_range=self.reduce_range,
            activations=self.activations,
            per_token=self.per_token,
            rounding=self.rounding,
            act_order=self.act_order,
        )
        device = weight.device
        scale, zero = (None if part is None else part.to(device) for part in grid)
        return replace(made, input_scale=scale, input_zero=zero)
