"""Two of every four inputs, their values quantized: `recast::sparse24_codes_matmul`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.launch import pairs_of
from recast.kernels.sparse24_codes_matmul.codes_op import sparse24_codes_matmul
from recast.kernels.sparse24_codes_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.reference import unpack_bits
from recast.lowering.packed import Packed, plain
from recast.lowering.triton.few import ALWAYS, measured_few
from recast.lowering.triton.serving.dequantizing import codes_of
from recast.passes.forms.codebook import Codebook
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized

__all__ = ["SPARSE24_CODES", "serve"]

SPARSE24_CODES = "triton 2:4 dequantizing matmul"


def serve(operator: Operator) -> Packed | None:
    """Lay out codes and places; None for what is no 2:4 weight of codes."""
    if not isinstance(operator, NMSparse) or (operator.keep, operator.of) != (2, 4) or operator.features % 4:
        return None
    values = operator.values
    if not isinstance(values, Quantized | Codebook):
        return None
    reason = _refused(values)
    if reason is not None:
        return plain(operator, f"aten (2:4: {reason})")
    bits, found = values.bits, codes_of(values)
    zero, table, pairs = 2 ** (bits - 1), found.table, found.pairs
    if table is not None:
        table, zero = _beginning_with_zero(table)
        pairs = None if pairs is None else pairs_of(table)
    codes = found.codes if found.table is None else found.codes ^ zero
    words, marks = to_lanes(
        codes, unpack_bits(operator.indices, 2, values.shape[1]), bits, 0 if found.table is not None else zero
    )
    # Two of four are kept, so a group of values is one of twice as many inputs.
    group = 2 * found.group
    given = {"values": words, "places": marks, "scale": found.scale, "table": table, "pairs": pairs}
    held = {name: tensor for name, tensor in given.items() if tensor is not None}

    def multiply(tensors: Mapping[str, Tensor], x: Tensor, few: int) -> Tensor:
        parts = (tensors.get(name) for name in ("scale", "table", "pairs"))
        y: Tensor = sparse24_codes_matmul(x, tensors["values"], tensors["places"], *parts, None, bits, group, few)
        return y

    about: tuple[Any, ...] = (
        operator.features,
        operator.dtype,
        words.device,
        "2:4 codes",
        operator.shape[0],
        bits,
        group,
        *held,
    )
    few = measured_few(functools.partial(multiply, held), *about)
    return Packed(operator, SPARSE24_CODES, held, functools.partial(multiply, few=ALWAYS if few is None else few))


def _refused(values: Quantized | Codebook) -> str | None:
    """Why the kernel does not take values, None where it does."""
    if values.bits not in (4, 8):
        return f"values of {values.bits} bits: no kernel"
    if values.group is not None and values.group % 8 and values.group < values.shape[1]:
        return f"groups of {values.group} values are no multiple of 8"
    if isinstance(values, Quantized):
        if values.activations:
            return "rounded activations: no kernel"
        return None if values.zero is None else "values with zero points: no kernel"
    if tuple(values.table.shape[:2]) != (1, 1) or values.table.shape[3] != 1:
        return "tables of vectors, or several: no kernel"
    if values.bits == 8:
        return "values from a table of 256: no kernel"
    return None if bool((values.table == 0).any()) else "values from a table without zero: no kernel"


def _beginning_with_zero(table: Tensor) -> tuple[Tensor, int]:
    """Put a table's zero first, by exclusive-or of its codes with what is returned beside it."""
    zero = int((table == 0).nonzero()[0])
    return table[torch.arange(len(table), device=table.device) ^ zero].contiguous(), zero
