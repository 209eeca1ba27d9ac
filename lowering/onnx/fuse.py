"""Rewriting a program's graph into what ONNX Runtime runs fastest, before export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from recast.lowering.onnx.weights import contrib
from recast.patterns.program import Program

__all__ = ["finite_mask", "fuse", "named", "splice"]

aten = torch.ops.aten
_SYMBOLIC = torch.ops.onnx_symbolic._symbolic.default
_LAYOUTS = {
    aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten.slice.Tensor,
}  # fmt: skip


def fuse(program: Program, standard: bool = False) -> None:
    """Rewrite in place; every rewrite is exact up to the order of additions. With `standard`, into standard operators alone."""
    masks: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in list(program.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _attention(program, node, masks, standard)
    for node in list(program.graph.nodes):
        if node.target is aten.add.Tensor:
            _bias(program, node)
        elif node.target is aten.mul.Tensor:
            _divide(program, node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # strides may differ from those the model was traced with
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.module.recompile()


def _bias(program: Program, node: fx.Node) -> None:
    """``MatMulIntegerToFloat(...) + bias``: the product adds the bias as it writes."""
    product, bias = node.args[:2]
    if node.kwargs or not isinstance(product, fx.Node) or not isinstance(bias, fx.Node):
        return
    if product.target is not _SYMBOLIC or product.args[1] != "MatMulIntegerToFloat" or len(product.users) > 1:
        return
    if bias.op != "get_attr" or tuple(bias.meta["val"].shape) != tuple(product.meta["val"].shape[-1:]):
        return
    inputs = list(product.args[0])  # type: ignore[arg-type]
    if len(inputs) > 6 or bias.meta["val"].dtype != torch.float32:
        return
    node.replace_all_uses_with(product)
    program.graph.erase_node(node)
    with program.graph.inserting_before(product):
        earlier = program.graph.get_attr(str(bias.target))
    earlier.meta = dict(bias.meta)
    product.args = ([*inputs, *[None] * (6 - len(inputs)), earlier], *product.args[1:])


def _divide(program: Program, node: fx.Node) -> None:
    """``x * rsqrt(v)`` as ``x / sqrt(v)``: as ONNX Runtime knows a root mean square, which it then computes in one pass."""
    for x, inverse in (node.args, node.args[::-1]):
        if isinstance(inverse, fx.Node) and inverse.target is aten.rsqrt.default and isinstance(x, fx.Node):
            with program.graph.inserting_before(node):
                root = program.graph.call_function(aten.sqrt.default, (inverse.args[0],))
            root.meta = dict(inverse.meta)
            node.target, node.args = aten.div.Tensor, (x, root)
            return


def _attention(program: Program, node: fx.Node, masks: dict[fx.Node, tuple[fx.Node, ...]], standard: bool) -> None:
    """Write attention out: ONNX Runtime's CPU kernel for the whole of it is slower than its parts."""
    arguments = named(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    mask, causal = arguments["attn_mask"], arguments["is_causal"]
    if any(n.meta["val"].dtype != torch.float32 or n.meta["val"].dim() < 3 for n in (query, key, value)):
        return
    if arguments["dropout_p"] or (causal and mask is not None):
        return
    scale = arguments["scale"]
    factor = float(scale) if scale is not None else float(query.meta["val"].shape[-1]) ** -0.5
    shared = arguments["enable_gqa"]
    operands = [query, key, value]
    if mask is not None:
        if mask.meta["val"].dtype not in (torch.bool, torch.float32):
            return
        if mask not in masks:
            masks[mask] = finite_mask(program, mask)
        operands += masks[mask]

    def run(q: Tensor, k: Tensor, v: Tensor, *added: Tensor) -> Tensor:
        if shared:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        if standard:
            scores = torch.matmul(q * factor, k.transpose(-1, -2))
        else:
            scores = contrib("FusedMatMul", [q, k], [*q.shape[:-1], k.shape[-2]], transB=1, alpha=factor)
        if causal:
            rows, columns = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
            scores = scores + torch.where(columns <= rows.unsqueeze(-1), 0.0, torch.finfo(torch.float32).min)
        elif added:
            scores = scores + added[0]
        y = torch.softmax(scores, -1) @ v
        return y * added[1] if len(added) > 1 else y

    result = splice(program, node, run, operands)
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)


def finite_mask(program: Program, mask: fx.Node) -> tuple[fx.Node, ...]:
    """What is added to scores, and 0 for rows that see nothing, whose result torch defines as zero, else 1.

    The mask alone where it is made of two finite numbers: no row is then without a key.
    """
    lowest = torch.finfo(torch.float32).min
    if _is_finite(mask, lowest):
        return (mask,)

    def added(m: Tensor) -> Tensor:
        return torch.where(m, 0.0, lowest) if m.dtype == torch.bool else m.clamp_min(lowest)

    def seen(m: Tensor) -> Tensor:
        sees = m if m.dtype == torch.bool else m >= lowest
        return sees.to(torch.float32).amax(-1, keepdim=True)

    found = [splice(program, mask, run, [mask], after=True) for run in (added, seen)]
    return found[0], found[1]


def _is_finite(mask: fx.Node, lowest: float) -> bool:
    """Whether a mask of floats is chosen from two numbers that are finite, and laid out anew at most."""
    node: Any = mask
    while isinstance(node, fx.Node) and node.target in _LAYOUTS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.where.Scalar:
        return False
    return all(isinstance(n, int | float) and lowest <= n <= -lowest for n in node.args[1:3])


def named(node: fx.Node) -> dict[str, Any]:
    """Arguments of a `scaled_dot_product_attention` by name."""
    schema = aten.scaled_dot_product_attention.default._schema.arguments
    found = {a.name: a.default_value if a.has_default_value() else None for a in schema}
    found.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    found.update(node.kwargs)
    return found


def splice(
    program: Program, node: fx.Node, run: Callable[..., Any], operands: list[fx.Node], after: bool = False
) -> Any:
    """Write what `run` does with some nodes' values into the graph, before or after a node; gives its result's node or nodes."""
    with torch.no_grad():
        # Nodes copied from one another hold the same value, which tracing would take for one operand.
        values = [o.meta["val"].detach() for o in operands]
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*values)
    environment: dict[fx.Node, Any] = {}
    graph = program.graph
    where = graph.inserting_before(node.next if after else node)
    result: Any = None
    with where:
        given = iter(operands)
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                environment[inner] = next(given)
            elif inner.op == "call_function":
                environment[inner] = graph.node_copy(inner, lambda n: environment[n])
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], environment.__getitem__)
            else:
                raise TypeError(
                    f"what is written into a graph must not hold tensors of its own ({inner.format_node()})"
                )
    return result
