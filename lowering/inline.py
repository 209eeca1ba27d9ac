"""Put in place of every operator node what a target runs it with, as plain graph operations over named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from recast.passes.dialect import inline_dialect
from recast.passes.forms.operator import Operator
from recast.passes.meta import fake_mode_of
from recast.passes.module import OperatorModule
from recast.patterns.program import Program, set_by_path

__all__ = ["Choose", "Emit", "inline_operators"]

# Runs an operator on x; its tensors are those of the operator handed over (fake while tracing).
Emit = Callable[[Operator, Tensor], Tensor]
# Kernel of an operator: a name for the report, the operator as the kernel wants it (repacked, say), and what runs it.
Choose = Callable[[Operator], tuple[str, Operator, Emit]]


def inline_operators(program: Program, choose: Choose) -> tuple[Program, dict[str, str]]:
    """Replace operator nodes by the operations of the chosen kernels.

    Parameters
    ----------
    program
        A rewritten program; not changed. Operations of the dialect in it are traced away.
    choose
        Picks the kernel of each operator.

    Returns
    -------
    program, kernels
        A program without operator nodes, and the kernel of each site. Tensors of operators are buffers named
        ``recast_operators.<site>.<tensor>``, so that caches of compiled code are keyed by their shapes and not by their values.
    """
    flat = inline_dialect(program)
    result = program.copy() if flat is program else flat
    graph = result.graph
    mode = fake_mode_of(result)
    kernels: dict[str, str] = {}
    chosen: dict[str, tuple[Operator, Emit]] = {}
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        module = result.module.get_submodule(path)
        assert isinstance(module, OperatorModule)
        if path not in chosen:
            with _disable_current_modes(), torch.no_grad():
                kernels[module.site], operator, emit = choose(module.operator)
            chosen[path] = (operator, emit)
        _inline(result, node, module, *chosen[path], mode)
    for path, (operator, _) in chosen.items():
        module = result.module.get_submodule(path)
        assert isinstance(module, OperatorModule)
        order = module.order
        parent, _, name = path.rpartition(".")
        delattr(result.module.get_submodule(parent), name)
        for label, tensor in _held(operator, path, order).items():
            set_by_path(result.module, label, tensor.detach())
    graph.lint()
    result.module.recompile()
    return result, kernels


def _held(operator: Operator, path: str, order: Tensor | None) -> dict[str, Tensor]:
    found = {f"{path}.{name}": tensor for name, tensor in operator.tensors().items()}
    return found if order is None else {**found, f"{path}.order": order}


def _inline(program: Program, node: fx.Node, module: OperatorModule, operator: Operator, emit: Emit, mode: Any) -> None:
    path = str(node.target)
    held = _held(operator, path, module.order)
    has_bias = len(node.args) > 1

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        bias, tensors = (rest[0], rest[1:]) if has_bias else (None, rest)
        y = emit(operator.with_tensors(dict(zip([*operator.tensors()], tensors, strict=False))), x)
        if module.order is not None:
            y = torch.index_select(y, -1, tensors[-1])
        return y if bias is None else y + bias

    with _disable_current_modes():
        fakes = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in held.values()]
    operands = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
    with torch.no_grad():
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*operands, *fakes)
    traced.graph.eliminate_dead_code()  # questions about dtypes, asked while tracing, are recorded too
    graph = program.graph
    environment: dict[fx.Node, Any] = {}
    placeholders = traced.graph.find_nodes(op="placeholder")
    environment.update(zip(placeholders, node.args, strict=False))
    with graph.inserting_before(node):
        for inner, name, fake in zip(placeholders[len(node.args) :], held, fakes, strict=True):
            environment[inner] = graph.create_node("get_attr", name)  # get_attr() would warn: the buffer comes below
            environment[inner].meta["val"] = fake
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                environment[inner] = graph.node_copy(inner, lambda n: environment[n])
                for key in ("stack_trace", "nn_module_stack"):
                    if key in node.meta:
                        environment[inner].meta[key] = node.meta[key]
            elif inner.op == "get_attr":
                raise TypeError(
                    f"kernel of '{module.site}' closes over a tensor; it must take all tensors from its operator"
                )
            elif inner.op == "output":
                result = environment[inner.args[0]]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
