"""Trace operations of the dialect away: targets, files and some passes know ATen operations only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from recast.passes.dead import remove_dead
from recast.patterns.program import Program

__all__ = ["has_dialect", "inline_dialect", "is_dialect"]


def is_dialect(node: fx.Node) -> bool:
    """Whether a node calls an operation of the dialect: a plain function of a package of patterns."""
    target = node.target
    return (
        node.op == "call_function"
        and callable(target)
        and hasattr(target, "__code__")
        and (getattr(target, "__module__", "") or "").split(".")[0] not in ("torch", "math", "_operator", "builtins")
    )


def has_dialect(program: Program) -> bool:
    """Whether a program holds operations of the dialect."""
    return any(is_dialect(node) for node in program.graph.nodes)


def inline_dialect(program: Program) -> Program:
    """Replace each operation of the dialect by the ATen operations of its body.

    Returns
    -------
    Program
        The program itself if there are none; else a copy.
    """
    if not has_dialect(program):
        return program
    result = program.copy()
    for node in list(result.graph.nodes):
        if is_dialect(node):
            _inline(result.graph, node)
    remove_dead(result.graph)
    result.graph.lint()
    result.module.recompile()
    return result


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    """Trace a function over its operands' shapes and put what it did in its place."""
    operands = list(dict.fromkeys(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)))
    function: Callable[..., Any] = node.target  # type: ignore[assignment]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(operands, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given.get(n, n.meta["val"]))
        return function(*args, **kwargs)

    with torch.no_grad():
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*(n.meta["val"] for n in operands))
    traced.graph.eliminate_dead_code()
    environment: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: environment[n])
            elif inner.op == "call_function":
                made = environment[inner] = graph.node_copy(inner, lambda n: environment[n])
                made.meta |= {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # each is operator.getitem(node, i)
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
            graph.erase_node(user)
    graph.erase_node(node)
