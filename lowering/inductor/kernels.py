"""Which kernel runs which operator under Inductor.

On a CPU the int8 product goes to oneDNN (`recast::int8_matmul`), with rounding and scaling around it left to Inductor, which
fuses them with their neighbours. Everything else is plain ATen. With freezing, Inductor would fold the unpacking of weights
into constants laid out for oneDNN; they are unpacked here instead, which gives the same and spares it the tracing and compiling.
So weight-only forms run at the speed of dense ones and save bytes on disk only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.ops import int8_matmul, largest_exact_code
from recast.kernels.quantized_matmul.reference import quantize_tokens
from recast.lowering.packed import Packed, chooser, plain
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.sparse import Sparse

__all__ = ["INTEGER", "choose", "choose_frozen"]

INTEGER = "onednn int8"
SATURATES = "aten, rounded in float: this CPU's int8 product would saturate"
WRITTEN_OUT = "aten (sparse, written out)"
UNPACKED = "aten (unpacked once)"


def _linear(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, held["weight"].to(x.dtype))


def _leaf(operator: Operator) -> Packed | None:
    if isinstance(operator, Sparse) and not isinstance(operator, ColumnSparse):
        # What Inductor would fold unpacking into, without the time to compile it.
        return Packed(operator, WRITTEN_OUT, {"weight": operator.to_dense().contiguous()}, _linear)
    if not isinstance(operator, Quantized) or not operator.activations:
        return None
    simple = operator.symmetric and operator.scale.shape[1] == 1
    if not simple or int(operator.values.to(torch.int32).abs().max()) > largest_exact_code():
        return plain(operator, SATURATES)
    per_token, scale = operator.per_token, operator.by_row().scale[:, 0].float()
    held = {
        "values": operator.values,
        "scale": scale,
        # Of the weight alone, so it is summed here: Inductor does not fold sums of integers.
        "offset": operator.values.sum(1).float() * scale,
    }

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``y = (sum q w - z sum w) * s_x * s_w`` with q, z, s_x of each token, or of all."""
        codes, scale, zero = quantize_tokens(x, per_token=per_token)
        values = tensors["values"]
        sums: Tensor = int8_matmul(codes.reshape(-1, x.shape[-1]), values, tensors["scale"])
        sums = sums.reshape(*x.shape[:-1], values.shape[0])
        return ((sums - zero * tensors["offset"]) * scale).to(x.dtype)

    return Packed(operator, INTEGER, held, run)


def _frozen_leaf(operator: Operator) -> Packed | None:
    """For weights that are constants of what is compiled."""
    stored = isinstance(operator, Codebook) or (isinstance(operator, Quantized) and not operator.activations)
    if stored and all(tensor.device.type == "cpu" for tensor in operator.tensors().values()):
        return Packed(operator, UNPACKED, {"weight": operator.to_dense().contiguous()}, _linear)
    return _leaf(operator)


choose = chooser(_leaf, "aten")
choose_frozen = chooser(_frozen_leaf, "aten")
