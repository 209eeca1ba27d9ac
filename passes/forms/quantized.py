"""Integer weights: the operator; `quantized_fit` makes them."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul import reference
from recast.passes.forms.operator import Cost, Operator, dtype_from_name, dtype_name, matmul_cost

__all__ = ["Quantized", "outline_quantized", "without_grids"]


@dataclass(frozen=True, eq=False, repr=False)
class Quantized(Operator):
    """A weight (m, n) as integer codes, ``(code - zero) * scale`` with one scale for each group of a row's inputs.

    Attributes
    ----------
    values
        int8 (m, n); below eight bits uint8 (m, bytes), codes packed by `reference.pack_codes`: for four bits two a byte,
        the even input in the low half.
    scale
        (m, groups) floating; (1, 1) where all of the matrix shares one.
    zero
        Of the same shape, int8 or below eight bits uint8; None for symmetric codes (the middle code, for four bits 8, is zero).
    bits
        2, 3, 4 or 8.
    group
        Inputs in a group, the last group of a row may be shorter; None for one group a row.
    full_shape
        (m, n).
    activations
        Whether `apply` also rounds its inputs to int8 as they come ("W8A8", dynamic).
    per_token
        Whether each input vector then has a scale and zero point of its own; else all vectors share one pair.
    compute
        The floating dtype of `to_dense`.
    input_scale, input_zero
        (1,), float32 and int8, where inputs are rounded on a grid known beforehand ("static"); None: as they come.
    """

    kind: ClassVar[str] = "quantized"
    values: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int | None
    full_shape: tuple[int, int]
    activations: bool = False
    compute: torch.dtype = field(default=torch.float32)
    per_token: bool = True
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None

    def __post_init__(self) -> None:
        m, n = self.full_shape
        reference.code_range(self.bits, self.zero is None)
        columns = reference.packed_bytes(n, self.bits)
        groups = reference.group_count(n, self.group)
        shared = self.group is None and tuple(self.scale.shape) == (1, 1)
        expected = {"values": (m, columns), "scale": (1, 1) if shared else (m, groups)}
        if self.zero is not None:
            expected["zero"] = expected["scale"]
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"quantized: {name} has shape {tuple(getattr(self, name).shape)}, {shape} is needed")
        if self.activations and self.bits != 8:
            raise ValueError(f"quantized: activations are rounded for 8 bit weights only, not for {self.bits}")
        if (self.input_scale is None) != (self.input_zero is None) or (self.static and not self.activations):
            raise ValueError("quantized: a grid for the inputs is a scale and a zero point, and goes with activations")

    @property
    def shape(self) -> tuple[int, int]:
        return self.full_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.compute

    @property
    def symmetric(self) -> bool:
        """Whether the codes have no zero point."""
        return self.zero is None

    @property
    def static(self) -> bool:
        """Whether inputs are rounded on a grid known beforehand."""
        return self.input_scale is not None

    @property
    def grid(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of the inputs, where they are known beforehand."""
        return None if self.input_scale is None or self.input_zero is None else (self.input_scale, self.input_zero)

    def rounded_inputs(self, x: Tensor) -> Tensor:
        """Return what x (..., n) is rounded to, in its dtype."""
        if self.grid is None:
            codes, scale, zero = reference.quantize_tokens(x, per_token=self.per_token)
        else:
            codes, (scale, zero) = reference.quantize_inputs(x, *self.grid), self.grid
        return ((codes.to(scale.dtype) - zero) * scale).to(x.dtype)

    def by_row(self) -> Quantized:
        """Return the same weight with a scale for each row also where one stands for the whole matrix, as kernels take it."""
        m = self.full_shape[0]
        if self.scale.shape[0] == m:
            return self
        zero = None if self.zero is None else self.zero.expand(m, 1).contiguous()
        return replace(self, scale=self.scale.expand(m, 1).contiguous(), zero=zero)

    def apply(self, x: Tensor) -> Tensor:
        if not self.activations:
            return reference.dequantizing_matmul(
                x, self.values, self.scale, self.zero, bits=self.bits, group=self.group
            )
        if x.requires_grad and torch.is_grad_enabled():
            # Rounding has no slope; its gradient is taken as that of the identity ("straight through").
            rounded = x + (self.rounded_inputs(x.detach()) - x).detach()
            return torch.nn.functional.linear(rounded, self.to_dense().to(x.dtype))
        return reference.dynamic_int8_matmul(
            x, self.values, self.scale, self.zero, group=self.group, per_token=self.per_token, inputs=self.grid
        )

    def to_dense(self) -> Tensor:
        return reference.dequantize(
            self.values,
            self.scale,
            self.zero,
            bits=self.bits,
            group=self.group,
            features=self.full_shape[1],
            dtype=self.compute,
        )

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        return matmul_cost(self.shape, 2 * m * n * tokens, self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        found = {"values": self.values, "scale": self.scale}
        if self.zero is not None:
            found["zero"] = self.zero
        if self.grid is not None:
            found["input_scale"], found["input_zero"] = self.grid
        return found

    def fields(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "shape": list(self.full_shape),
            "symmetric": self.symmetric,
            "activations": self.activations,
            "per_token": self.per_token,
            "dtype": dtype_name(self.compute),
            **({"static": True} if self.static else {}),
        }

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        m, n = fields["shape"]
        return cls(
            tensors["values"],
            tensors["scale"],
            None if fields["symmetric"] else tensors["zero"],
            int(fields["bits"]),
            None if fields["group"] is None else int(fields["group"]),
            (int(m), int(n)),
            bool(fields["activations"]),
            dtype_from_name(fields["dtype"]),
            bool(fields["per_token"]),
            *((tensors["input_scale"], tensors["input_zero"]) if fields.get("static") else ()),
        )

    def to(self, dtype: torch.dtype) -> Quantized:
        return replace(self, compute=dtype)


def without_grids(operator: Operator) -> Operator:
    """Return the same operator with inputs as they are where it would round them on a grid known beforehand."""
    if isinstance(operator, Quantized):
        return replace(operator, activations=False, input_scale=None, input_zero=None) if operator.static else operator
    children = operator.children()
    if not children:
        return operator
    changed = {name: without_grids(child) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return operator
    return type(operator).build(operator.fields(), operator.own_tensors(), changed)


def outline_quantized(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    activations: bool = False,
    per_token: bool = True,
    per_tensor: bool = False,
    static: bool = False,
) -> Quantized:
    """Return what `fit_quantized` would make, on the meta device."""
    m, n = shape
    scales = (1, 1) if per_tensor else (m, reference.group_count(n, group))
    code = torch.int8 if bits == 8 else torch.uint8
    return Quantized(
        torch.empty(m, reference.packed_bytes(n, bits), dtype=code, device="meta"),
        torch.empty(scales, dtype=torch.promote_types(dtype, torch.float32), device="meta"),
        None if symmetric else torch.empty(scales, dtype=code, device="meta"),
        bits,
        group,
        shape,
        activations,
        dtype,
        per_token,
        torch.empty(1, device="meta") if static else None,
        torch.empty(1, dtype=torch.int8, device="meta") if static else None,
    )
