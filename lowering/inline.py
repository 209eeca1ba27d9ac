"""Put in place of every operator node what a target runs it with, as plain graph operations over named tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from recast.passes.dialect import inline_dialect
from recast.passes.forms.operator import Operator
from recast.passes.meta import fake_mode_of
from recast.passes.module import OperatorModule
from recast.patterns.errors import FormError
from recast.patterns.program import Program, set_by_path

__all__ = ["Choose", "Emit", "inline_operators", "structure_of"]

# Runs an operator on x; its tensors are those of the operator handed over (fake while tracing).
Emit = Callable[[Operator, Tensor], Tensor]
# Kernel of an operator: a name for the report, the operator as the kernel wants it (repacked, say), and what runs it.
# What it emits may depend on the kernel's name, on the operator's fields and on shapes and dtypes of tensors, not on values.
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
        A program without operator nodes, and the kernel of each site. What runs a site has its name as ``meta["recast_site"]``.
        Tensors of operators are buffers named ``recast_operators.<site>.<tensor>``, so that caches of compiled code are keyed by
        their shapes and not by their values.
    """
    flat = inline_dialect(program)
    result = program.copy() if flat is program else flat
    graph = result.graph
    mode = fake_mode_of(result)
    kernels: dict[str, str] = {}
    chosen: dict[str, tuple[str, Operator, Emit]] = {}
    emitted: dict[Hashable, _Emitted] = {}
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        module = result.module.get_submodule(path)
        assert isinstance(module, OperatorModule)
        if path not in chosen:
            with _disable_current_modes(), torch.no_grad():
                chosen[path] = choose(module.operator)
            kernels[module.site] = chosen[path][0]
        kernel, operator, emit = chosen[path]
        held = _held(operator, path, module.order)
        operands = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
        # Layers repeat: what was emitted for one is copied for its likes.
        alike = (
            kernel,
            structure_of(module.operator),
            *map(_layout, [*operands, *held.values()]),
            module.order is None,
        )
        if alike not in emitted:
            emitted[alike] = _emit(module, operator, emit, operands, list(held.values()), mode)
        _insert(result, node, emitted[alike], list(held), module.site)
    for path, (_, operator, _) in chosen.items():
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


def structure_of(operator: Operator) -> Hashable:
    """Everything an operator is, besides its tensors."""
    children = tuple((name, structure_of(child)) for name, child in operator.children().items())
    return type(operator), repr(sorted(operator.fields().items())), children


def _layout(tensor: Tensor) -> Hashable:
    def text(sizes: Sequence[Any]) -> tuple[Hashable, ...]:
        return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)

    return text(tensor.shape), text(tensor.stride()), tensor.dtype, tensor.device


@dataclass
class _Emitted:
    """What runs an operator, as a graph over x, the bias if there is one, and the held tensors."""

    graph: fx.Graph
    held: list[Tensor]


def _emit(
    module: OperatorModule, operator: Operator, emit: Emit, operands: list[Tensor], held: list[Tensor], mode: Any
) -> _Emitted:
    has_bias = len(operands) > 1

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        bias, tensors = (rest[0], rest[1:]) if has_bias else (None, rest)
        y = emit(operator.with_tensors(dict(zip([*operator.tensors()], tensors, strict=False))), x)
        if module.order is not None:
            y = torch.index_select(y, -1, tensors[-1])
        return y if bias is None else y + bias

    with _disable_current_modes():
        fakes = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in held]
    with torch.no_grad(), mode:  # what an operator makes from nothing, such as a range, is fake as well
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*operands, *fakes)
    traced.graph.eliminate_dead_code()  # questions about dtypes, asked while tracing, are recorded too
    if traced.graph.find_nodes(op="get_attr"):
        raise FormError(
            f"site '{module.site}': what runs the operator '{module.operator.kind}' reads a tensor that the operator does not "
            "name, or makes one from numbers; its own_tensors would hold it"
        )
    return _Emitted(traced.graph, fakes)


def _insert(program: Program, node: fx.Node, emitted: _Emitted, held: list[str], site: str) -> None:
    """Put a copy of what was emitted in the place of a node; `held` are the paths its tensors will have."""
    graph = program.graph
    placeholders = emitted.graph.find_nodes(op="placeholder")
    environment: dict[fx.Node, Any] = dict(zip(placeholders, node.args, strict=False))
    with graph.inserting_before(node):
        for inner, name, fake in zip(placeholders[len(node.args) :], held, emitted.held, strict=True):
            environment[inner] = graph.create_node("get_attr", name)  # get_attr() would warn: the buffer comes later
            environment[inner].meta["val"] = fake
        for inner in emitted.graph.nodes:
            if inner.op == "call_function":
                environment[inner] = graph.node_copy(inner, lambda n: environment[n])
                environment[inner].meta["recast_site"] = site
                for key in ("stack_trace", "nn_module_stack"):
                    if key in node.meta:
                        environment[inner].meta[key] = node.meta[key]
            elif inner.op == "output":
                result = environment[inner.args[0]]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
