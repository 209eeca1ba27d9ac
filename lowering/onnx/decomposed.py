"""Exported programs that need no decomposition, or hardly any, before they become ONNX graphs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

__all__ = ["Decomposed"]

_aten = torch.ops.aten
# Python's operators on masks, and the operations they are.
_SAME: dict[Any, Any] = {
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__and__.Scalar: _aten.bitwise_and.Scalar,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.__or__.Scalar: _aten.bitwise_or.Scalar,
    _aten.__xor__.Tensor: _aten.bitwise_xor.Tensor,
    _aten.__xor__.Scalar: _aten.bitwise_xor.Scalar,
}


class Decomposed(torch.export.ExportedProgram):
    """An exported program that is traced again only where the exporter has something to decompose.

    Programs are functional and in canonical operations when they come here, most of which the exporter takes as they are;
    tracing the whole for nothing took half of the time of an export. Where the exporter lacks one of them all the same
    (`torch.onnx.OnnxExporterError`), the plain exported program is what to try next.
    """

    @classmethod
    def of(cls, exported: torch.export.ExportedProgram) -> Decomposed:
        """Take over an exported program; operations with two names in its graph get the one that the exporter knows."""
        for module in exported.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_function":
                        _rename(node)
        return cls(
            root=exported.graph_module,
            graph=exported.graph,
            graph_signature=exported.graph_signature,
            state_dict=exported.state_dict,
            range_constraints=exported.range_constraints,
            module_call_graph=exported.module_call_graph,
            example_inputs=exported.example_inputs,
            constants=exported.constants,
        )

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> torch.export.ExportedProgram:
        """Trace with a table of decompositions, or return the program itself if nothing in it is in the table."""
        modules = [m for m in self.graph_module.modules() if isinstance(m, fx.GraphModule)]
        if decomp_table is not None and not any(n.target in decomp_table for m in modules for n in m.graph.nodes):
            return self
        found = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return cast(torch.export.ExportedProgram, found)


def _rename(node: fx.Node) -> None:
    node.target = _SAME.get(node.target, node.target)
    if node.target is _aten.to.dtype:
        x, dtype = node.args[:2]
        node.target, node.args, node.kwargs = _aten._to_copy.default, (x,), {"dtype": dtype}
