"""Which values of a graph are constant: functions of weights alone, reached through views, transposes and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.program import Program, get_by_path

__all__ = ["Constants"]

_PICKS = {torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}


class Constants:
    """The constant values of a program.

    A value is constant if it is a weight that the program does not write to, or a pure function of constants only. Random
    operations and operations that write to their inputs are never constant.

    Parameters
    ----------
    program
        The program looked at; it must not change while this object is in use.

    Attributes
    ----------
    weights
        Of the program, gathered once.
    sources
        For every constant value, the names of the weights it is made of.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = program.weights
        written = {name for _, kind, name in program.interface.mutations if kind == "weight"}
        self.sources: dict[fx.Node, tuple[str, ...]] = {}
        self._values: dict[fx.Node, Any] = {}
        self._layouts: dict[fx.Node, Any] = {}
        self._literals: set[fx.Node] = set()  # made of nothing but numbers that stand in the graph
        for node in program.graph.nodes:
            if node.op == "get_attr":
                if node.target not in written and isinstance(get_by_path(program.module, node.target), Tensor):
                    self.sources[node] = (node.target,)
            elif self._made_of_constants(node):
                # Numbers of rows are not what is multiplied.
                of = node.all_input_nodes[:1] if node.target in _PICKS else node.all_input_nodes
                self.sources[node] = tuple(dict.fromkeys(name for n in of for name in self.sources[n]))
            elif node.op == "call_function" and all(n in self._literals for n in node.all_input_nodes) and _pure(node):
                self._literals.add(node)

    def _made_of_constants(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        operands = node.all_input_nodes
        if node.target in _PICKS and operands and operands[0] in self.sources:
            operands = [n for n in operands if n not in self._literals]
        return bool(operands) and all(n in self.sources for n in operands) and _pure(node)

    def __contains__(self, node: object) -> bool:
        return node in self.sources

    def value(self, node: fx.Node) -> Any:
        """Compute a constant; views stay views of the weight."""
        if node.op == "get_attr":
            return get_by_path(self.program.module, str(node.target))
        if node not in self._values:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.value)
            with torch.no_grad():
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def layout(self, node: fx.Node) -> Any:
        """The same constant on the meta device: shape, strides and whose memory it shows, without reading a weight."""
        if node not in self._layouts:
            if node.op == "get_attr":
                value = get_by_path(self.program.module, str(node.target))
                shape, stride = tuple(value.shape), value.stride()
                self._layouts[node] = torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.layout)
                args, kwargs = fx.node.map_aggregate(
                    (args, kwargs), lambda a: "meta" if isinstance(a, torch.device) else a
                )
                with torch.no_grad():
                    self._layouts[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._layouts[node]

    def storages(self, node: fx.Node) -> list[torch.UntypedStorage]:
        """Memory of the weights that a constant is made of."""
        return [get_by_path(self.program.module, name).untyped_storage() for name in self.sources[node]]


def _pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._name == "recast::onnx_node":  # a weight that is quantized already must not be fitted again
            return False
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return getattr(target, "__module__", "") == "_operator"
