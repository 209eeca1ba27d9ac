"""What torch says in terms of memory, or of complex numbers, in terms of values: tensors in ONNX have no strides."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from recast.lowering.onnx.fuse import splice
from recast.patterns.errors import TargetError
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import Program

__all__ = ["without_memory"]

aten = torch.ops.aten


def without_memory(program: Program) -> None:
    """Rewrite in place: views by strides see memory as it was when the model was traced, complex numbers move as pairs.

    torch's exporter takes ``as_strided`` to count along the values of a tensor in their order. Where they lie in another order in
    memory, which is what ``as_strided`` counts along, the file computes something else.

    Raises
    ------
    TargetError
        A view by strides of a tensor that is itself a part of memory: what lies beside it is not known.
    """
    for node in list(program.graph.nodes):
        if node.target is aten.as_strided.default:
            _strided(program, node)
        elif node.target is aten.unsqueeze.default and node.meta["val"].is_complex():
            _pairs(program, node)


def _strided(program: Program, node: fx.Node) -> None:
    """``x.as_strided(...)`` of a copy of x whose values come in the order of memory."""
    named = dict(zip(("input", "size", "stride", "storage_offset"), node.args, strict=False)) | dict(node.kwargs)
    source, size, stride = named["input"], named["size"], named["stride"]
    assert isinstance(source, fx.Node)
    x: Tensor = source.meta["val"]
    order = sorted(range(x.dim()), key=lambda d: (-size_hint(x.stride(d)), -size_hint(x.shape[d])))
    held = x.permute(order)
    offset = named.get("storage_offset")
    start = 0 if offset is None else offset - x.storage_offset()  # type: ignore[operator]
    if not held.is_contiguous() or (isinstance(start, int) and start < 0):
        raise TargetError(
            f"target 'onnx': '{node.name}' is a view by strides (as_strided) of '{source.name}', which is itself a part of what lies "
            "in memory, and ONNX has no memory to look at; .contiguous() before it, or indexing instead of it, would work"
        )
    with program.graph.inserting_before(node):
        turned = source
        if order != list(range(x.dim())):
            turned = program.graph.call_function(aten.permute.default, (source, order))
            turned.meta = {**source.meta, "val": held}
            turned = program.graph.call_function(
                aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}
            )
            turned.meta = {**source.meta, "val": held}
    node.args, node.kwargs = (turned, size, stride, start), {}


def _pairs(program: Program, node: fx.Node) -> None:
    """A new dimension of complex numbers, which the exporter has no translation of, as one of pairs."""
    source, place = node.args
    assert isinstance(source, fx.Node)
    place = place % node.meta["val"].dim()

    def run(c: Tensor) -> Tensor:
        return torch.view_as_complex(torch.view_as_real(c).unsqueeze(place))

    result = splice(program, node, run, [source])
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
