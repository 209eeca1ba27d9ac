"""A graph as a module: its nodes run in order with torch's operations, under `torch.export` too."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from recast.patterns.capture.onnx.graph import Graph, Node
from recast.patterns.capture.onnx.kept import Kept
from recast.patterns.capture.onnx.names import identifiers, weight_names
from recast.patterns.capture.onnx.operator import Call, function_of
from recast.patterns.capture.onnx.values import Known, Left, Value, known, tensor_of
from recast.patterns.errors import CaptureError, RecastError
from recast.patterns.program import get_by_path, set_by_path

__all__ = ["OnnxModule"]

UNKNOWN = "an operator unknown here"


class OnnxModule(nn.Module):
    """Runs an ONNX graph.

    Parameters
    ----------
    graph
        As read. Constants become parameters (floating point) and buffers under names of their modules; numbers that shapes are made
        of stay numbers.

    Attributes
    ----------
    names
        How inputs are called here, by their names in the file.
    kept
        Nodes that have no torch operation, and stay.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.names = identifiers([value.name for value in graph.inputs])
        self.kept = Kept()
        self.watch = False
        self._graph = graph
        self._numbers: dict[str, Known] = {}
        self._paths: dict[str, str] = {}
        self._last = _last_readers(graph)
        self._wanted = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
        self._hold(graph)
        self.forward = self._named(graph)

    def _hold(self, graph: Graph) -> None:
        sizes = {name for node in graph.nodes if node.type in ("Resize", "Upsample") for name in node.inputs[1:]}
        held: dict[str, Tensor] = {}
        for name, value in graph.constants.items():
            numbers = known(value, name, every=name in sizes)
            if numbers is not None:
                self._numbers[name] = numbers
            elif name in self._wanted:
                held[name] = value
        self._paths = weight_names(graph, held)
        for name, path in self._paths.items():
            value = held[name]
            floating = value.is_floating_point() and value.dtype.itemsize > 1
            set_by_path(self, path, nn.Parameter(value) if floating else value)
        graph.constants = dict.fromkeys(graph.constants, torch.empty(0))  # held here from now on

    def _named(self, graph: Graph) -> Any:
        """``forward`` with the inputs as its parameters: `torch.export` and callers see them by name."""
        plain = [self.names[value.name] for value in graph.inputs]

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            given = dict(zip(plain, args, strict=False)) | kwargs
            if missing := [name for name in plain if name not in given]:
                raise TypeError(f"input '{missing[0]}' is not given; the graph takes {', '.join(plain)}")
            return self._run({value.name: given[self.names[value.name]] for value in graph.inputs})

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in plain]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return forward

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self._equal_sizes(given)
        values: dict[str, Value] = {**self._numbers, **given}
        for name, path in self._paths.items():
            values[name] = get_by_path(self, path)
        for place, node in enumerate(self._graph.nodes):
            inputs = tuple(values[name] if name else None for name in node.inputs)
            for name, value in zip(node.outputs, self._results(place, node, inputs), strict=False):
                if name and value is not None:
                    values[name] = value
            for name in self._last.get(place, ()):
                values.pop(name, None)
        return {name: tensor_of(values[name]) for name in self._graph.outputs}

    def _results(self, place: int, node: Node, inputs: tuple[Value | None, ...]) -> list[Value | None]:
        run = function_of(node)
        wanted = tuple(bool(name) and name in self._wanted for name in node.outputs)
        try:
            if run is None:
                raise Left(UNKNOWN)
            made = run(Call(node, inputs, wanted))
            return [made] if isinstance(made, Tensor | Known) else list(made)
        except Left as left:
            tensors = [None if value is None else tensor_of(value) for value in inputs]
            return [*self.kept.run(place, node, tensors, str(left), watch=self.watch)]
        except (RecastError, GuardOnDataDependentSymNode):
            raise
        except Exception as error:
            shapes = ", ".join("none" if value is None else str(list(value.shape)) for value in inputs)
            raise CaptureError(
                f"onnx: {node.operator} '{node.label}' does not run on inputs of {shapes}: {str(error).splitlines()[0]}"
            ) from error

    def _equal_sizes(self, given: dict[str, Tensor]) -> None:
        """Tell the tracer which sizes are equal: those of one name, and batches."""
        first: dict[Any, Any] = {}
        for value in self._graph.inputs:
            tensor = given[value.name]
            if tensor.ndim != len(value.shape):
                raise CaptureError(
                    f"onnx: input '{value.name}' has {len(value.shape)} dimensions, a tensor of {list(tensor.shape)} was given"
                )
            for axis, (size, name) in enumerate(zip(tensor.shape, value.shape, strict=True)):
                if isinstance(name, int) or isinstance(size, int):
                    continue
                torch._check(size == first.setdefault(name, size))
                if axis == 0 and size.node.hint == getattr(first.get(0, size), "node", size.node).hint:
                    torch._check(size == first.setdefault(0, size))


def _last_readers(graph: Graph) -> dict[int, list[str]]:
    """For each place in the graph, the values that nothing after it reads."""
    last: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        last.update(dict.fromkeys([*node.inputs, *node.outputs], place))
    found: dict[int, list[str]] = {}
    for name, place in last.items():
        if name and name not in graph.outputs:
            found.setdefault(place, []).append(name)
    return found
