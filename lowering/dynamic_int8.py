"""Int8 weights whose inputs are rounded, as they come or on a known grid, around whatever multiplies the integers on a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from recast.kernels.quantized_matmul.reference import quantize_inputs, quantize_tokens
from recast.lowering.packed import Packed
from recast.passes.forms.quantized import Quantized

__all__ = ["dynamic_int8"]


def dynamic_int8(operator: Quantized, kernel: str, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Packed:
    """Lay a symmetric weight with a scale for each row out.

    Parameters
    ----------
    operator
        With rounded activations.
    kernel
        Name of what multiplies, for the report.
    product
        Of codes (tokens, n) and a weight (m, n), both int8, and the rows' scales (m,): scaled sums, float32 (tokens, m).
    """
    per_token, scale = operator.per_token, operator.by_row().scale[:, 0].float()
    held = {
        "values": operator.values,
        "scale": scale,
        # Of the weight alone, so it is summed here: Inductor does not fold sums of integers.
        "offset": operator.values.sum(1).float() * scale,
    }
    if operator.grid is not None:
        held["input_scale"], held["input_zero"] = operator.grid

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``y = (sum q w - z sum w) * s_x * s_w`` with q, z, s_x of each token, or of all."""
        if "input_scale" in tensors:
            scale, zero = tensors["input_scale"], tensors["input_zero"].float()
            codes = quantize_inputs(x, scale, zero)
        else:
            codes, scale, zero = quantize_tokens(x, per_token=per_token)
        values = tensors["values"]
        sums = product(codes.reshape(-1, x.shape[-1]), values, tensors["scale"])
        sums = sums.reshape(*x.shape[:-1], values.shape[0])
        return ((sums - zero * tensors["offset"]) * scale).to(x.dtype)

    return Packed(operator, kernel, held, run)
