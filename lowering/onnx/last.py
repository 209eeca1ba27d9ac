"""Logits of the last token alone: what leads to them, and to nothing else, is computed for that token alone.

A prompt needs one row of logits. The rows of its other tokens are dropped not before the head but right after the last attention:
its output projection, its MLP and the last norm serve nothing but the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.onnx.fuse import splice
from recast.passes.dialect import inline_dialect
from recast.passes.meta import fake_mode_of
from recast.passes.module import OperatorModule
from recast.patterns.program import Program

__all__ = ["keep_last"]

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_SAME = {
    aten.clone.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.alias.default,
    aten.type_as.default,
    aten.dropout.default,
}
_PRODUCTS = {aten.linear.default, aten.matmul.default}
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_ALONG = {aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.amax.default: 1, aten.softmax.int: 1, aten.cat.default: 1}


def keep_last(program: Program) -> tuple[Program, int]:
    """Compute the logits of a decoder for the last token of each text only, (batch, 1, vocabulary).

    The last token is the last of those given that the mask counts, so that padding may stand on either side.

    Parameters
    ----------
    program
        A decoder with its cache; not changed.

    Returns
    -------
    program, nodes
        The program, and how many of its nodes are computed for one token now.
    """
    flat = inline_dialect(program)
    result = program.copy() if flat is program else flat
    graph = result.graph
    (output,) = graph.find_nodes(op="output")
    logits: fx.Node = output.args[0][0]
    batch, sequence = next(n for n in result.inputs() if n.target == "input_ids").meta["val"].shape
    alone: dict[fx.Node, None] = {}
    for node in reversed(list(graph.nodes)):
        users = set(node.users)
        serves = users <= {*alone, output} if node is logits else bool(users) and users <= set(alone)
        # The logits may be given back twice, or be looked at elsewhere: then they stay as they are.
        once = node is not logits or sum(value is logits for value in output.args[0]) == 1
        if serves and once and _by_token(result, node, batch, sequence):
            alone[node] = None
    last = _last(result)
    cut: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n in alone]:
        for operand in node.all_input_nodes:
            if operand not in alone and operand not in cut and _has_tokens(operand, batch, sequence):
                cut[operand] = _take(result, operand, last)
        node.args, node.kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: cut.get(n, n))
        if node.target in _VIEWS:
            sizes: Any = node.args[1]
            node.args = (node.args[0], [sizes[0], 1, *sizes[2:]])
        node.meta["val"] = _one(result, node.meta["val"])
    if not alone:
        taken = _take(result, logits, last)
        output.args = ((taken, *output.args[0][1:]),)
    graph.eliminate_dead_code()
    graph.lint()
    result.module.recompile()
    return result, len(alone)


def _has_tokens(node: fx.Node, batch: Any, sequence: Any) -> bool:
    """Whether a value, or each of several, is (batch, sequence, ...)."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return bool(values) and all(
        isinstance(v, Tensor) and v.dim() > 2 and _same(v.shape[0], batch) and _same(v.shape[1], sequence)
        for v in values
    )


def _same(size: Any, other: Any) -> bool:
    if isinstance(size, int) or isinstance(other, int):
        return isinstance(size, int) and isinstance(other, int) and size == other
    return bool(size.node.expr == other.node.expr)


def _free_of_tokens(node: fx.Node, sequence: Any) -> bool:
    """Whether a value has no size that is made of the number of tokens: a weight, a constant."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    symbols = set() if isinstance(sequence, int) else sequence.node.expr.free_symbols
    return not any(not isinstance(s, int) and s.node.expr.free_symbols & symbols for s in value.shape)


def _by_token(program: Program, node: fx.Node, batch: Any, sequence: Any) -> bool:
    """Whether a value is (batch, sequence, ...), and each token's part of it is made of the same token's parts of others."""
    if node.op not in ("call_function", "call_module") or not _has_tokens(node, batch, sequence):
        return False
    operands = node.all_input_nodes
    if node.target in _VIEWS:
        sizes: Any = node.args[1]
        return _has_tokens(operands[0], batch, sequence) and len(sizes) > 2
    wide = [n for n in operands if _has_tokens(n, batch, sequence)]
    if not wide or any(n not in wide and not _free_of_tokens(n, sequence) for n in operands):
        return False
    dims = {n.meta["val"].dim() for n in wide if isinstance(n.meta["val"], Tensor)}
    if node.op == "call_module":
        return isinstance(program.module.get_submodule(str(node.target)), OperatorModule) and len(wide) == 1
    target: Any = node.target
    if getattr(target, "__name__", "") == "getitem" or target in _SAME:
        return True
    if target in _PRODUCTS:
        right: Any = node.args[1]
        return wide == [node.args[0]] and right.meta["val"].dim() <= 2
    if target in _NORMS:
        return wide == [node.args[0]] and len(node.args[1]) <= max(dims) - 2  # type: ignore[arg-type]
    if target in _ALONG or target in (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default):
        return _along(node, max(dims))
    # What is not (batch, sequence, ...) is stretched along both, or has one entry there.
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and len(dims) == 1


def _along(node: fx.Node, dims: int) -> bool:
    """Whether what an operation does along a dimension is neither along texts nor along tokens."""
    if node.target is aten.slice.Tensor:
        along: Any = node.args[1] if len(node.args) > 1 else 0
        return node.args[2:] in ((), (0,), (0, 2**63 - 1)) or along % dims > 1
    place = 1 if node.target in _ALONG else 2
    given: Any = node.args[place] if len(node.args) > place else 0
    found = given if isinstance(given, list | tuple) else [given]
    return bool(found) and all(isinstance(d, int) and d % dims > 1 for d in found)


def _one(program: Program, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_one(program, v) for v in value)
    with fake_mode_of(program):
        return value.new_empty([value.shape[0], 1, *value.shape[2:]])


def _last(program: Program) -> fx.Node:
    """Which of the tokens given is each text's last, int64 (batch, 1, 1)."""
    inputs = {str(n.target): n for n in program.inputs()}
    first_call = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        # The last of the mask, not what follows the cache: one that is written in place is longer than what is in it.
        own = mask[:, -ids.shape[1] :].to(torch.int64)
        return (own * (torch.ones_like(ids).cumsum(-1) - 1)).amax(-1, keepdim=True).unsqueeze(-1)

    found: fx.Node = splice(program, first_call, run, [inputs["input_ids"], inputs["attention_mask"]])
    return found


def _take(program: Program, value: fx.Node, last: fx.Node) -> fx.Node:
    def run(x: Tensor, place: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        rows = torch.gather(flat, 1, place.expand(-1, -1, flat.shape[-1]))
        return rows.reshape(x.shape[0], 1, *x.shape[2:])

    found: fx.Node = splice(program, value, run, [value, last], after=True)
    return found
