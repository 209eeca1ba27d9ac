"""Capture from a `torch.compile` graph: the same operations and the same `Program` as through `torch.export`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from recast.patterns.capture.canonical import canonicalise
from recast.patterns.program import Interface, Program, graph_module, set_by_path

__all__ = ["Captured", "from_dynamo"]

aten = torch.ops.aten

_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|\[([0-9]+)\]")


@dataclasses.dataclass(frozen=True)
class Captured:
    """A program and how it hangs on the dynamo graph it came from.

    Parameters
    ----------
    program
        Weights are ``get_attr`` of the very tensors that the caller's graph receives as inputs.
    kept
        Positions, among the graph's inputs, of those that remain placeholders of the program.
    weights
        The tensors that became weights, by name.
    """

    program: Program
    kept: tuple[int, ...]
    weights: dict[str, Tensor]


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Turn what dynamo hands to a backend into a `Program`.

    Parameters
    ----------
    gm
        The graph module of one graph (between breaks there are several).
    example_inputs
        Its inputs: parameters and buffers are real tensors among them, the rest fake or symbolic.

    Notes
    -----
    Retracing runs under ``tracing_mode="real"`` because the example values already are fake tensors of dynamo's own mode:
    sizes stay symbolic and guards made here are dynamo's.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value", real) for node, real in zip(placeholders, example_inputs, strict=True)]

    def run(*args: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*args)

    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), contextlib.nullcontext())
    with mode:  # tensors made on the way (positions, masks) must be fake as well
        traced = make_fx(run, pre_dispatch=True, decomposition_table={}, tracing_mode="real")(*fakes)
    names: dict[int, str] = {}
    kept: list[int] = []
    written = _written(traced)
    inner = traced.graph.find_nodes(op="placeholder")
    for position, (node, real) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if _is_static(node, real) and inner[position] not in written:
            names[position] = _name(node, position)
        else:
            kept.append(position)
    program = _program(traced, names, example_inputs)
    weights = {names[p]: example_inputs[p] for p in names}
    return Captured(program, tuple(kept), weights)


def _program(traced: fx.GraphModule, names: dict[int, str], reals: Sequence[Any]) -> Program:
    root, graph = nn.Module(), fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    attributes: dict[int, fx.Node] = {}
    taken: set[str] = set()
    position = -1
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            position += 1
        if node.op == "placeholder" and position in names:
            name = names[position]
            while name in taken:
                name += "_"
            taken.add(name)
            set_by_path(root, name, reals[position])
            attributes[position] = graph.get_attr(name)
            attributes[position].meta = dict(node.meta)
            environment[node] = attributes[position]
        elif node.op == "get_attr":  # tensors made while tracing
            set_by_path(root, str(node.target), getattr(traced, str(node.target)))
            environment[node] = graph.node_copy(node, lambda n: environment[n])
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            output = graph.output(tuple(environment[r] if isinstance(r, fx.Node) else r for r in results))
            output.meta = dict(node.meta)
        else:
            environment[node] = graph.node_copy(node, lambda n: environment[n])
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    count = len(graph.find_nodes(op="output")[0].args[0])
    program = Program(
        module=graph_module(root, graph),
        interface=Interface(
            parameters=(),
            args=tuple(inputs),
            kwargs=(),
            in_spec=pytree.tree_structure((tuple(0 for _ in inputs), {})),
            out_spec=pytree.tree_structure([0] * count),
        ),
        door="dynamo",
        training=_is_training(graph),
        label="graph",
    )
    canonicalise(program)
    return program


def _is_static(node: fx.Node, real: Any) -> bool:
    """Whether an input is a parameter or buffer of a module, which dynamo promises to stay where it is."""
    described = node.meta.get("tensor_dict") or {}
    return isinstance(real, nn.Parameter) or (isinstance(real, Tensor) and "_dynamo_static_input_type" in described)


def _name(node: fx.Node, position: int) -> str:
    """Original dotted name of a parameter, from the source that dynamo noted."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    label = getattr(source, "name", "")
    text = label() if callable(label) else str(label)  # a method before torch 2.11, a property since
    _, _, path = text.partition("]")  # behind L['self'], or whatever variable holds the model
    steps = [next(part for part in match if part) for match in _STEP.findall(path)]
    return ".".join(steps) or f"input_{position}"


def _written(traced: fx.GraphModule) -> set[fx.Node]:
    """Inputs that the graph writes to in place; they are no constants."""
    found = set()
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.is_write and isinstance(value, fx.Node):
                    found.add(_root(value))
    return found


def _root(node: fx.Node) -> fx.Node:
    """The value whose memory a chain of views shows."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _is_training(graph: fx.Graph) -> bool:
    """Whether this is a training graph: the mode itself is not visible to a backend, its effects are."""
    for node in graph.nodes:
        if node.target in (aten.dropout.default, aten.feature_dropout.default) and node.args[2] and node.args[1] != 0:
            return True
        if node.target is aten.batch_norm.default and node.args[5]:
            return True
        if node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4 and node.args[4]:
            return True
    return False
