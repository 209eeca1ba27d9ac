"""Composite operations that show memory of their operands, written as what they are composed of: one by one, not by tracing anew."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from recast.patterns.capture.canonical import inline, write_out
from recast.patterns.program import fixed_size

__all__ = ["can_be_expanded", "expand_composites"]

aten = torch.ops.aten

# Removed while canonicalising, where they do nothing; where they do, how they are spelled follows from the whole graph.
_LEFT = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.detach_.default}
# Which argument says that it draws at random or goes by the statistics of each batch, which it may keep.
_SETTINGS = {aten.dropout.default: 2, aten.feature_dropout.default: 2, aten.alpha_dropout.default: 2}
_SETTINGS |= {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def can_be_expanded(module: fx.GraphModule) -> bool:
    """Whether no operation writes in place, or drops at random, here or in a region: then nothing depends on shared memory."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable and node.target not in _LEFT:
                return False
            if node.target in _SETTINGS and node.args[_SETTINGS[node.target]]:
                return False
            if _is_expanded(node.target) and not all("val" in operand.meta for operand in node.all_input_nodes):
                return False
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() not in _REGIONS:  # type: ignore[no-untyped-call]
            return False
    return all(can_be_expanded(inner) for inner in module.children() if isinstance(inner, fx.GraphModule))


def expand_composites(module: fx.GraphModule) -> None:
    """Write out, in place, what `ExportedProgram.run_decompositions` with an empty table would: ``reshape``, ``to``, ``mT`` ...

    Operations that only compute (``linear``, ``matmul``, ``softmax``) stay whole, composite or not.
    """
    for inner in module.children():
        if isinstance(inner, fx.GraphModule):
            expand_composites(inner)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default:
            _by_kept_statistics(module.graph, node)
        elif _is_expanded(node.target):
            _expand(node)
    _multiply_sizes(module.graph)
    _settle_sizes(module.graph)
    _read_sizes_of_inputs(module.graph)
    module.recompile()


def _multiply_sizes(graph: fx.Graph) -> None:
    """Write the number of elements as a product of sizes, which every target knows."""
    for node in graph.find_nodes(op="call_function", target=aten.sym_numel.default):
        source = node.args[0]
        value = source.meta["val"]
        result: Any = math.prod(size for size in value.shape if isinstance(size, int))
        for dimension, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                with graph.inserting_before(node):
                    factor = graph.call_function(aten.sym_size.int, (source, dimension))
                    factor.meta = {"val": size}
                    before = result.meta["val"] if isinstance(result, fx.Node) else result
                    result = factor if result == 1 else graph.call_function(operator.mul, (result, factor))
                    result.meta = {"val": before * size}
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        else:
            write_out(node, result)
        graph.erase_node(node)


def _settle_sizes(graph: fx.Graph) -> None:
    """Write as numbers the sizes that were free when they were met, and that an operation further on settled."""

    def settled(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            known = fixed_size(value)
            return value if known is None else known
        if isinstance(value, FakeTensor) and value.layout is torch.strided:
            sizes, strides = [settled(s) for s in value.shape], [settled(s) for s in value.stride()]
            if any(type(a) is not type(b) for a, b in zip(sizes, value.shape, strict=True)):
                with value.fake_mode, torch.no_grad():
                    again = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
                    return again.requires_grad_(value.requires_grad)
        return value

    for node in graph.nodes:
        value = node.meta.get("val")
        if value is None or node.op == "placeholder":  # of an input it is told that it was settled
            continue
        node.meta["val"] = tuple(map(settled, value)) if isinstance(value, tuple) else settled(value)
        if isinstance(value, torch.SymInt) and isinstance(node.meta["val"], int):
            write_out(node, node.meta["val"])


def _read_sizes_of_inputs(graph: fx.Graph) -> None:
    """Read each symbolic size from the first input that has it: else what is in between has one reader more."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    last = None
    for node in graph.find_nodes(op="placeholder"):
        last = node
        value = node.meta.get("val")
        for dimension, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                known.setdefault(size.node.expr, (node, dimension))
    made: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = node.meta.get("val")
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression not in known or last is None:
            continue
        if expression not in made:
            with graph.inserting_after(last):
                made[expression] = graph.call_function(aten.sym_size.int, known[expression])
            made[expression].meta = dict(node.meta)
        node.replace_all_uses_with(made[expression])
        graph.erase_node(node)


def _is_expanded(target: Any) -> bool:
    """Composite, and its result may share memory with an operand: the same question that torch asks."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target not in _LEFT
        and any(argument.alias_info is not None for argument in target._schema.arguments)
        and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    )


def _expand(node: fx.Node) -> None:
    operands = node.all_input_nodes
    values = [operand.meta["val"] for operand in operands]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), contextlib.nullcontext())
    target: Any = node.target

    def run(*given: Any) -> Any:
        known = dict(zip(operands, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        return target(*args, **kwargs)

    with mode, torch.no_grad():
        traced = make_fx(run, decomposition_table={}, tracing_mode="real")(*values)
    told = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "torch_fn")}
    for made in inline(node, traced.graph, operands):
        made.meta.update(told)


def _by_kept_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Write batch norm as the operation that can do nothing else than normalise by what was kept."""
    x, weight, bias, mean, variance, _, momentum, eps = node.args[:8]
    target = aten._native_batch_norm_legit_no_training.default
    operands = fx.node.map_arg((x, weight, bias, mean, variance), lambda n: n.meta["val"])
    with graph.inserting_before(node):
        whole = graph.call_function(target, (x, weight, bias, mean, variance, momentum, eps))
        result = graph.call_function(operator.getitem, (whole, 0))
    whole.meta = dict(node.meta)
    with node.meta["val"].fake_mode:
        whole.meta["val"] = target(*operands, momentum, eps)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
