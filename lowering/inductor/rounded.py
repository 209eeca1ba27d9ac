"""Int8 weights whose inputs are rounded, on a CPU with VNNI: our own product, with what stands around it in the graph.

Inductor's code around a product of the matrix library writes its sums to memory, reads them to finish them, writes that, and reads it
again to round it for the next product. `recast::rounded_linear` finishes sums in registers, and rounds them where the next product is
all that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from recast.kernels.eight_bit_matmul import rounded_rows
from recast.kernels.eight_bit_matmul.rounded_linear_op import round_rows, rounded_linear
from recast.kernels.quantized_matmul.reference import quantize_tokens
from recast.lowering.packed import Packed
from recast.lowering.pairs import given, numbered
from recast.passes.forms.quantized import Quantized
from recast.patterns.program import Program, get_by_path

__all__ = ["KERNEL", "joined", "rounded_product"]

KERNEL = "recast int8 product (VNNI)"
_OPS = torch.ops.recast
_MOST = 2**31 // (255 * 128)  # products of two bytes that 32 bits hold the sum of, whatever they are


def rounded_product(operator: Quantized) -> Packed | None:
    """Lay a symmetric weight with a scale for each row out; None where the kernel does not run."""
    tensors = operator.tensors().values()
    if rounded_rows.unavailable() is not None or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    if operator.shape[1] > _MOST:
        return None
    values, outputs, per_token = operator.values, operator.shape[0], operator.per_token
    extra = (0, -outputs % rounded_rows.OUTPUTS)
    held = {
        "weights": rounded_rows.to_lanes(values),
        "scale": torch.nn.functional.pad(operator.by_row().scale[:, 0].float(), extra),
        "sums": torch.nn.functional.pad(values.sum(1, dtype=torch.int32), extra),
    }
    if operator.grid is not None:
        scale, zero = operator.grid
        held["grid"] = torch.cat([scale.float().reshape(1), zero.float().reshape(1) + 128])

    def run(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        own = x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)
        grid = tensors.get("grid")
        if grid is None and not per_token:
            _, scale, zero = quantize_tokens(own, per_token=False)
            grid = torch.cat([scale.reshape(1), zero.reshape(1) + 128])
        codes, grid = round_rows(own, grid)
        parts = (tensors[name] for name in ("weights", "scale", "sums"))
        y: Tensor = rounded_linear(codes, grid, *parts, outputs, own.dtype)
        return y.to(x.dtype)

    return Packed(operator, KERNEL, held, run)


def joined(program: Program) -> None:
    """Round what several products read once, and what only a product reads where it is made; the program is changed in place."""
    graph = program.graph
    seen: dict[Any, fx.Node] = {}
    alike = numbered(graph)
    for node in graph.find_nodes(op="call_function", target=_OPS.round_rows.default):
        x, grid = node.args
        same = seen.setdefault((alike[x], _grid(program, grid, alike)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=_OPS.round_rows.default):
        made, grid = node.args
        if made.target is not _OPS.rounded_linear.default or list(made.users) != [node]:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(_OPS.rounded_linear_codes.default, (*given(made).values(), grid))
        new.meta = {**made.meta, "val": node.meta["val"]}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        graph.erase_node(made)
    graph.lint()
    program.module.recompile()


def _grid(program: Program, grid: fx.Node | None, alike: Mapping[fx.Node, int]) -> Any:
    """What tells grids apart: their numbers where those are constants, else how they are computed."""
    if grid is None or grid.op != "get_attr":
        return None if grid is None else alike[grid]
    return tuple(get_by_path(program.module, str(grid.target)).tolist())
