"""Canonicalisation: remove what carries no meaning, in place, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from recast.patterns.program import Program

__all__ = ["canonicalise", "inline", "write_out"]

aten = torch.ops.aten

_ASSERTIONS = {aten._assert_tensor_metadata.default}
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.detach_.default}
_DROPOUT = {aten.dropout.default: 2, aten.native_dropout.default: 2, aten.feature_dropout.default: 2}


def canonicalise(program: Program) -> None:
    """Inline regions; drop assertions, aliases, no-op casts, eval-mode dropout and dead code; settle numbers, strides of attention."""
    inline_regions(program)
    graph = program.graph
    settle_numbers(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS or node.target is torch._C._set_grad_enabled:  # values depend on neither
            graph.erase_node(node)
        elif (source := _identity(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _reshape_attention(graph)
    _multiply_unrepeated(graph)
    graph.eliminate_dead_code(is_impure_node=_impure)
    graph.lint()
    program.module.recompile()


def _reshape_attention(graph: fx.Graph) -> None:
    """Let what follows a fused attention be reshaped, not viewed: its strides depend on the kernel, which gradients may change."""
    left = list(graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default))
    while left:
        for user in left.pop().users:
            if user.target in _VIEWS:
                user.target = aten.reshape.default
            if user.target in _MOVES or user.target is aten.reshape.default:
                left.append(user)


def _multiply_unrepeated(graph: fx.Graph) -> None:
    """``bmm(x, weight repeated for each of a batch)  ->  matmul(x, weight)``, on either side, with or without an addend."""
    for target in (aten.bmm.default, aten.baddbmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            operands: tuple[Any, ...] = node.args
            *addend, left, right = operands
            if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
                continue
            with graph.inserting_before(node):
                own = [_unrepeated(operand) for operand in (left, right)]
                if (own[0] is None) == (own[1] is None):
                    continue
                product = graph.call_function(aten.matmul.default, (own[0] or left, own[1] or right))
                product.meta = dict(node.meta)
                result = graph.call_function(aten.add.Tensor, (product, *addend)) if addend else product
                result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """The weight (two dimensions) that a value repeats along a first one, None if it does not."""
    if node.target not in (aten.expand.default, aten.repeat.default) or node.meta["val"].dim() != 3:
        return None
    source: Any = node.args[0]
    sizes: Any = node.args[1]
    matrix: fx.Node = source.args[0] if source.target is aten.unsqueeze.default and source.args[1] == 0 else source
    if matrix.op != "get_attr" or matrix.meta["val"].dim() != 2:
        return None
    once = [(-1, size) if node.target is aten.expand.default else (1,) for size in matrix.meta["val"].shape]
    return matrix if all(size in those for size, those in zip(sizes[1:], once, strict=True)) else None


_VIEWS = {aten.view.default, aten._unsafe_view.default}
_MOVES = {
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
}


def settle_numbers(graph: fx.Graph) -> None:
    """Write out numbers that are read from tensors made of literals alone, such as those of a loop over ``arange(experts)``."""
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload | _BUILTINS):
            continue
        made = node.target in _MADE if not node.all_input_nodes else all(n in known for n in node.all_input_nodes)
        if not made or not _small(node) or not _repeatable(node.target):
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        with torch.no_grad():
            known[node] = node.target(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))
    for node, value in reversed(known.items()):
        if node.target in _READS and isinstance(value, int | float | bool):
            write_out(node, value)


_MADE = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default, aten.full.default}
_READS = {aten.item.default, aten._local_scalar_dense.default}
_BUILTINS = type(len)


def _repeatable(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _small(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return all(
        not isinstance(v, Tensor) or (all(isinstance(s, int) for s in v.shape) and v.numel() <= 4096) for v in values
    )


def write_out(node: fx.Node, value: Any) -> None:
    """Write a value that is known where it is read."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _impure(node: fx.Node) -> bool:
    return bool(node.is_impure()) or (node.op == "call_function" and "_assert" in str(node.target))


def _identity(node: fx.Node) -> fx.Node | None:
    """The node this one only repeats, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in _ALIASES:
        return source
    if node.target is aten.dropout.default and node.args[2] is False:
        return source
    if node.target is aten.clone.default:
        return source if _computed(source) and not node.kwargs.get("memory_format") else None
    if node.target is aten._to_copy.default or node.target is aten.to.dtype:
        return source if _same_type(node, source) else None
    return None


def _computed(node: fx.Node) -> bool:
    """Whether a value has memory of its own: a copy of it is never told from it."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target.is_view
        and target._schema.returns[0].alias_info is None
    )


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    return before.dtype == after.dtype and before.device == after.device and before.layout == after.layout


def inline_regions(program: Program) -> None:
    """Replace gradient-mode and disabled-autocast regions by their contents; values do not depend on either."""
    changed = True
    while changed:
        changed = False
        for node in list(program.graph.nodes):
            body = _region(node, program)
            if body is not None:
                inline(node, body[0].graph, body[1])
                changed = True
    program.module.delete_all_unused_submodules()


def _region(node: fx.Node, program: Program) -> tuple[fx.GraphModule, Any] | None:
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        position = 1
    elif name == "wrap_with_autocast" and node.args[2] is False:
        position = 4
    else:
        return None
    body = node.args[position]
    assert isinstance(body, fx.Node)
    module = getattr(program.module, str(body.target))
    return module, node.args[position + 1 :]


def inline(node: fx.Node, body: fx.Graph, operands: Iterable[Any]) -> list[fx.Node]:
    """Put what a graph computes of some operands in the place of a node; the values that it is computed by."""
    graph = node.graph
    environment: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                environment[inner] = next(inputs)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: environment[n])
            else:
                environment[inner] = graph.node_copy(inner, lambda n: environment[n])
    if isinstance(results, list | tuple):
        for user in list(node.users):  # each user is operator.getitem(node, i)
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
    graph.erase_node(node)
    return [environment[inner] for inner in body.nodes if inner.op not in ("placeholder", "output")]
