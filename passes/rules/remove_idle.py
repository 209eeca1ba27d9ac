"""Remove what does nothing: views to the same shape, turns there and back, factors of one; and what nobody reads."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from recast.passes.dead import has_effect
from recast.passes.exact import Edit, ExactPass

__all__ = ["RemoveIdle"]

aten = torch.ops.aten

_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}
_UNIT = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
}


@dataclasses.dataclass(frozen=True)
class RemoveIdle(ExactPass):
    """``view(x, shape of x) = x``, ``x^T^T = x``, ``1 x = x``, ``x + 0 = x``, ``cat(split(x)) = x``; dead values and weights go.

    Eval-mode dropout is gone since capture; what a rewrite leaves of it goes here.
    """

    name: ClassVar[str] = "remove_idle"

    def apply(self, edit: Edit) -> None:
        """Replace every idle operation by its operand."""
        results = set(edit.graph.find_nodes(op="output")[0].all_input_nodes)
        for node in edit.graph.nodes:
            if node.op == "call_function" and not node.users and not has_effect(node):
                edit.did(f"{node.name}: read by nothing")
        for node in list(edit.graph.nodes):
            source = _source(node)
            if source is None or not node.users:
                continue
            if node in results and source.op != "call_function":
                continue  # a result of its own, not the input's or the weight's memory
            edit.replace(node, source)
            edit.did(f"{node.name} = {source.name}")


def _source(node: fx.Node) -> fx.Node | None:
    """The value that an operation only repeats; None if it does something."""
    if node.op != "call_function" or not node.args:
        return None
    first, args = node.args[0], list[Any](node.args)
    if node.target is aten.cat.default:
        return _joined(node)
    if not isinstance(first, fx.Node) or not _alike(node, first):
        return None
    rank = first.meta["val"].ndim
    if node.target in _RESHAPES:
        return first
    if node.target is aten.clone.default:  # eval-mode dropout is traced as a copy
        return first if _owns_memory(first) and not node.kwargs.get("memory_format") else None
    if node.target in (aten._to_copy.default, aten.to.dtype, aten.type_as.default):
        return first if set(node.kwargs) <= {"dtype"} and len(args) <= 2 else None
    if node.target is aten.dropout.default:
        return first if args[2] is False or args[1] == 0 else None
    if node.target is aten.slice.Tensor:
        return first if len(args) < 5 or args[4] == 1 else None
    if node.target in _UNIT:
        number = args[1]
        idle = not isinstance(number, bool | fx.Node) and number == _UNIT[node.target] and not node.kwargs
        return first if idle else None
    if node.target is aten.transpose.int and first.target is aten.transpose.int:
        pairs = [{int(d) % rank for d in n.args[1:3]} for n in (node, first)]  # type: ignore[arg-type]
        return _node(first.args[0]) if pairs[0] == pairs[1] else None
    if node.target is aten.transpose.int:
        return first if int(args[1]) % rank == int(args[2]) % rank else None
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in args[1]]
        if order == sorted(order):
            return first
        if first.target is aten.permute.default:
            inner = [int(d) % rank for d in first.args[1]]  # type: ignore[union-attr, arg-type]
            return _node(first.args[0]) if [inner[d] for d in order] == list(range(rank)) else None
    return None


def _owns_memory(node: fx.Node) -> bool:
    """Whether a value is computed, no view: a copy of it is never told from it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.is_view:
        return False
    return target._schema.returns[0].alias_info is None


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether two values have the same shape (as symbols), dtype and device; turns are judged by what they turn."""
    a, b = node.meta.get("val"), source.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a.device != b.device:
        return False
    if node.target in (aten.transpose.int, aten.permute.default):
        return True
    return [str(s) for s in a.shape] == [str(s) for s in b.shape]


def _joined(node: fx.Node) -> fx.Node | None:
    """The value whose pieces are joined as they were split."""
    pieces, dim = list[Any](node.args[0]), node.args[1] if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if len(pieces) == 1:
        return _node(pieces[0])
    splits = {p.args[0] for p in pieces if isinstance(p, fx.Node) and p.target is operator.getitem}
    if len(splits) != 1 or [getattr(p, "args", (0, -1))[1] for p in pieces] != list(range(len(pieces))):
        return None
    split = splits.pop()
    if not isinstance(split, fx.Node) or split.target not in _SPLITS:
        return None
    source = _node(split.args[0])
    along = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if source is None or len(split.meta["val"]) != len(pieces):
        return None
    rank = source.meta["val"].ndim
    return source if int(along) % rank == int(dim) % rank else None  # type: ignore[arg-type]
