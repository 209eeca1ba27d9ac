"""Which kernel runs which operator under Inductor.

On a CPU with VNNI int8 products are our own (`rounded`). Without, they are oneDNN's (`recast::int8_matmul`), with rounding and scaling
around them left to Inductor, which fuses them with their neighbours. Weights whose activations stay as they are keep packed
(`recast::weight_only_matmul`): decoded in registers for few vectors, written out a slab at a time for many, from the number on at which
that is measured to be faster. Everything else is plain ATen. Where no C compiler is to be had and weights are constants (freezing),
they are unpacked once: Inductor would fold unpacking into constants laid out for oneDNN, which gives the same and takes it time to
trace and compile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.ops import int8_matmul, largest_exact_code
from recast.lowering.dynamic_int8 import dynamic_int8
from recast.lowering.inductor.rounded import rounded_product
from recast.lowering.inductor.weight_only import weight_only
from recast.lowering.inline import Choose
from recast.lowering.packed import Packed, chooser, plain
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.sparse import Sparse

__all__ = ["INTEGER", "choice"]

INTEGER = "onednn int8"
SATURATES = "aten, rounded in float: this CPU's int8 product would saturate"
WRITTEN_OUT = "aten (sparse, written out)"
UNPACKED = "aten (unpacked once)"


def _linear(held: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, held["weight"].to(x.dtype))


def _leaf(operator: Operator, keep_dense: bool = False, rounded: bool = False) -> Packed | None:
    if isinstance(operator, Sparse) and not isinstance(operator, ColumnSparse):
        # What Inductor would fold unpacking into, without the time to compile it.
        return Packed(operator, WRITTEN_OUT, {"weight": operator.to_dense().contiguous()}, _linear)
    if isinstance(operator, Quantized | Codebook) and not getattr(operator, "activations", False):
        return weight_only(operator, keep_dense=keep_dense, rounded=rounded)
    if not isinstance(operator, Quantized):
        return None
    simple = operator.symmetric and operator.scale.shape[1] == 1
    if not simple or int(operator.values.to(torch.int32).abs().max()) > largest_exact_code():
        return plain(operator, SATURATES)
    return rounded_product(operator) or dynamic_int8(operator, INTEGER, int8_matmul)


def _frozen_leaf(operator: Operator, keep_dense: bool = False, rounded: bool = False) -> Packed | None:
    """For weights that are constants of what is compiled."""
    found = _leaf(operator, keep_dense, rounded)
    if found is not None:
        return found
    stored = isinstance(operator, Codebook) or (isinstance(operator, Quantized) and not operator.activations)
    if stored and all(tensor.device.type == "cpu" for tensor in operator.tensors().values()):
        return Packed(operator, UNPACKED, {"weight": operator.to_dense().contiguous()}, _linear)
    return None


def choice(*, frozen: bool, keep_dense: bool = False, rounded: bool = False) -> Choose:
    """Choice of kernels where weights are constants of what is compiled (`frozen`), or inputs of it."""
    leaf = _frozen_leaf if frozen else _leaf
    return chooser(functools.partial(leaf, keep_dense=keep_dense, rounded=rounded), "aten")
