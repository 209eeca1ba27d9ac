"""LayerNorm to RMSNorm: where all that writes to the residual stream can be made to write vectors of mean zero."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from recast.passes.exact import Edit, ExactPass, call
from recast.passes.follow import moves, numbered, run_on
from recast.passes.structures import LayerNorm, arguments, is_norm, layer_norm_of, number_of
from recast.patterns.linear.packing import size_hint
from recast.patterns.sites import LinearSite, Use

__all__ = ["LayerNormToRMSNorm"]

aten = torch.ops.aten
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int}


@dataclasses.dataclass
class _Stream:
    """Values that are added up and normalised: a residual stream, with the axis (from the end) of its features.

    `writers` are what it begins with and what is added to it, `norms` what reads it.
    """

    size: int
    values: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    writers: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    norms: dict[fx.Node, LayerNorm] = dataclasses.field(default_factory=dict)
    todo: list[tuple[fx.Node, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class LayerNormToRMSNorm(ExactPass):
    """``LN(sum y_i) = RMS(sum (I - 11^T/d) y_i)``: a mean of zero need not be subtracted, if every writer's weights are centred.

    Needs a stream of sums alone, written to by linears, embeddings, convolutions and constants of its own, and read by layer
    norms alone.
    """

    name: ClassVar[str] = "layer_norm_to_rms_norm"

    def apply(self, edit: Edit) -> None:
        """Gather the stream of every layer norm, and rewrite it as a whole or not at all."""
        seen: set[fx.Node] = set()
        for node in list(edit.graph.nodes):
            norm = layer_norm_of(node)
            if norm is None or node in seen:
                continue
            if isinstance(norm, str):
                edit.refuse(node.name, norm, node)
                continue
            stream = _Stream(norm.size)
            reason = _gather(edit, norm.x, stream) or _changeable(edit, stream)
            seen |= set(stream.norms)
            if reason:
                edit.refuse(node.name, reason, node)
                continue
            _rewrite(edit, stream)
            return  # streams may share weights: one at a time


def _gather(edit: Edit, start: fx.Node, stream: _Stream) -> str:
    """Walk a stream up and down; say what does not belong in one."""
    stream.todo.append((start, -1))
    while stream.todo:
        node, axis = stream.todo.pop()
        if (known := stream.values.get(node)) is not None:
            if known != axis:
                return f"'{node.name}' would have its features along two dimensions"
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < -axis or size_hint(value.shape[axis]) != stream.size:
            return f"'{node.name}' is spread over the features of the residual stream"
        stream.values[node] = axis
        reason = _above(edit, node, axis, stream) or _below(node, axis, stream)
        if reason:
            return reason
    return ""


def _above(edit: Edit, node: fx.Node, axis: int, stream: _Stream) -> str:
    """How a value of the stream comes about."""
    first: Any = node.args[0] if node.args else None
    if (
        node in edit.constants
        or edit.product(node) is not None
        or node.target is aten.embedding.default
        or node.target in _CONVOLUTIONS
    ):
        stream.writers[node] = axis
    elif node.op == "placeholder":
        return f"the residual stream begins with the input '{node.name}', which cannot be centred"
    elif is_norm(node):
        return f"the residual stream holds the result of a norm, '{node.name}' (post-norm), whose mean is not zero"
    elif node.target is aten.add.Tensor and not node.kwargs and isinstance(node.args[1], fx.Node):
        stream.todo += [(first, axis), (node.args[1], axis)]
    elif number_of(node) is not None:
        stream.todo.append((first, axis))
    elif node.target is aten.cat.default:
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        rank = node.meta["val"].ndim
        if dim % rank == axis % rank:
            return f"'{node.name}' joins parts of the residual stream's features"
        stream.todo += [(part, axis) for part in first]
    elif moves(node) and node.target not in _SPLITS and isinstance(first.meta.get("val"), Tensor):
        source = _axis_above(node, first, axis, stream.size)
        if source is None:
            return f"'{node.name}' rearranges the features of the residual stream"
        stream.todo.append((first, source))
    elif node.target is aten.mul.Tensor and any(n in edit.constants for n in node.all_input_nodes):
        return (
            f"'{node.name}' scales what is written to the residual stream by a vector; fold that into its linear first"
        )
    else:
        return f"'{node.name}', which writes to the residual stream, is no linear, embedding, convolution or constant"
    return ""


def _below(node: fx.Node, axis: int, stream: _Stream) -> str:
    """Who reads a value of the stream."""
    for user in node.users:
        if user.op == "output":
            return f"the program gives '{node.name}' of the residual stream back as a result"
        norm = layer_norm_of(user)
        if isinstance(norm, str):
            return f"'{user.name}' reads the residual stream: {norm}"
        if norm is not None and axis == -1 and norm.x is node and user.all_input_nodes.count(node) == 1:
            stream.norms[user] = norm
        elif (
            (user.target is aten.add.Tensor and not user.kwargs and len(user.all_input_nodes) == len(user.args))
            or number_of(user) is not None
            or user.target is aten.cat.default
        ):
            stream.todo.append((user, axis))
        elif moves(user) and user.target not in _SPLITS and user.args[0] is node:
            below = _axis_of(run_on(user, numbered(node, axis)), stream.size)
            if below is None:
                return f"'{user.name}' rearranges the features of the residual stream"
            stream.todo.append((user, below))
        else:
            return f"'{user.name}' reads the residual stream and is no layer norm: it would see other values"
    return ""


def _axis_of(numbers: Tensor, size: int) -> int | None:
    """Along which dimension, from the end, numbers count from 0, staying the same along all others."""
    for axis in range(-1, -numbers.ndim - 1, -1):
        if numbers.shape[axis] == size:
            counted = torch.arange(size, dtype=numbers.dtype).reshape(-1, *[1] * (-axis - 1))
            if bool((numbers == counted).all()):
                return axis
    return None


def _axis_above(node: fx.Node, source: fx.Node, axis: int, size: int) -> int | None:
    for candidate in range(-1, -source.meta["val"].ndim - 1, -1):
        if size_hint(source.meta["val"].shape[candidate]) == size:
            found = _axis_of(run_on(node, numbered(source, candidate)), size)
            if found == axis:
                return candidate
    return None


def _changeable(edit: Edit, stream: _Stream) -> str:
    """Why the weights of a stream's writers cannot be centred."""
    linears: dict[str, tuple[LinearSite, list[Use]]] = {}
    for node, axis in stream.writers.items():
        found = edit.product(node)
        if found is not None:
            site, use = found
            if reason := edit.plain(use):
                return f"'{site.name}' writes to the residual stream: {reason}"
            if axis != -1:
                return f"'{site.name}' writes to the residual stream along another dimension than its features"
            linears.setdefault(site.name, (site, []))[1].append(use)
            continue
        weight = _written(node)
        made = edit.expression(weight) if isinstance(weight, fx.Node) else None
        if made is None:
            return f"the weight that '{node.name}' writes to the residual stream cannot be followed"
        if node.target in _CONVOLUTIONS and axis != 1 - node.meta["val"].ndim:
            return f"'{node.name}' writes to the residual stream along another dimension than its channels"
        if node.target is aten.embedding.default and axis != -1:
            return f"'{node.name}' writes to the residual stream along another dimension than its features"
        for name in made.sources:
            others = [r for r in edit.readers[name] if r not in stream.values]
            if others:
                return f"weight '{name}', which writes to the residual stream, is also read by '{others[0].name}'; untie it first"
    for site, uses in linears.values():
        if reason := edit.exclusive(site, tuple(uses)):
            return f"'{site.name}' writes to the residual stream and cannot be changed: {reason}"
    return ""


def _written(node: fx.Node) -> Any:
    """The weight that a writer writes with: a table, a kernel, or the constant itself."""
    if node.target is aten.embedding.default:
        return node.args[0]
    return node.args[1] if node.target in _CONVOLUTIONS else node


def _rewrite(edit: Edit, stream: _Stream) -> None:
    graph = edit.graph
    for node, axis in stream.writers.items():
        found = edit.product(node)
        if found is not None:
            site, use = found
            bias = edit.bias(use)
            with graph.inserting_before(node):
                new = edit.linear(site, use, use.x, edit.matrix(use).centred(0), bias and bias.centred(0))
            edit.replace(node, new)
        elif _written(node) is node:
            _replace_constant(edit, node, axis)
        else:
            _replace_weights(edit, node)
    for node in stream.norms:
        norm = layer_norm_of(node)  # again: what it reads has been replaced
        assert isinstance(norm, LayerNorm)
        with graph.inserting_before(node):
            new = norm.as_rms_norm(graph)
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        edit.replace(node, new)
    edit.did(f"{', '.join(n.name for n in stream.norms)}; {len(stream.writers)} writers centred")


def _replace_constant(edit: Edit, node: fx.Node, axis: int) -> None:
    made = edit.expression(node)
    assert made is not None
    name = made.sources[0]
    with edit.graph.inserting_before(node):
        new = edit.weight(name, made.centred(axis), edit.weights[name], made.sources)
    edit.replace(node, new)


def _replace_weights(edit: Edit, node: fx.Node) -> None:
    """An embedding or a convolution with centred weights."""
    given = arguments(node)
    table = node.target is aten.embedding.default
    matrix = edit.expression(given["weight"])
    bias = None if table or given["bias"] is None else edit.expression(given["bias"])
    assert matrix is not None
    like, args = edit.weights[matrix.sources[0]], list(node.args)
    with edit.graph.inserting_before(node):
        args[0 if table else 1] = edit.weight(
            matrix.sources[0], matrix.centred(-1 if table else 0), like, matrix.sources
        )
        if bias is not None:
            args[2] = edit.weight(bias.sources[0], bias.centred(0), like, bias.sources)
        new = call(edit.graph, node.target, *args, like=node, **node.kwargs)
    edit.replace(node, new)
