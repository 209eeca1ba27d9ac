"""Fold: a batch norm with fixed statistics goes into the convolution or linear before it."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import fx

from recast.passes.exact import Edit, ExactPass, call
from recast.passes.structures import arguments
from recast.patterns.derivation import Derivation
from recast.patterns.norm.dialect import batch_norm

__all__ = ["FoldBatchNorm"]

aten = torch.ops.aten

_STRAIGHT = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.linear.default,
}  # fmt: skip
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(ExactPass):
    """``g (W*x + b - m) / sqrt(v + eps) + h  ->  (s W)*x + (s (b - m) + h)`` with ``s = g / sqrt(v + eps)``."""

    name: ClassVar[str] = "fold_batch_norm"

    def apply(self, edit: Edit) -> None:
        """Fold every batch norm whose operand is made for it alone."""
        touched: set[str] = set()
        for node in list(edit.graph.nodes):
            given = _batch_norm(node)
            if given is None:
                continue
            reason = _fold(edit, node, given, touched)
            if reason:
                edit.refuse(_name(given, node), reason, node)


def _batch_norm(node: fx.Node) -> dict[str, Any] | None:
    if node.target is aten.batch_norm.default:
        return arguments(node)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        return arguments(node) | {"training": False}
    if getattr(node.target, "_opname", "") == "_native_batch_norm_legit":
        return {"running_mean": None, **arguments(node)}
    if node.target is batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias")
        return dict(zip(names, node.args, strict=True)) | {"training": False, "eps": node.kwargs["eps"]}
    return None


def _name(given: dict[str, Any], node: fx.Node) -> str:
    for role in ("weight", "running_mean"):
        if isinstance(given[role], fx.Node):
            return str(given[role].target).rpartition(".")[0] or str(given[role].target)
    return node.name


def _fold(edit: Edit, node: fx.Node, given: dict[str, Any], touched: set[str]) -> str:
    """Fold one batch norm; say why not."""
    if given["training"] or given["running_mean"] is None:
        return "it normalises by the statistics of each batch; capture the model in eval mode"
    roles = ("weight", "bias", "running_mean", "running_var")
    vectors = {r: None if given[r] is None else edit.expression(given[r]) for r in roles}
    if lost := [r for r in roles if given[r] is not None and vectors[r] is None]:
        return f"its {lost[0]} is not constant"
    x: fx.Node = given["input"]
    if x.target not in _STRAIGHT | _TRANSPOSED:
        return f"its operand '{x.name}' is no convolution or linear"
    if len(x.users) != 1:
        other = next(u for u in x.users if u is not node)
        return f"'{other.name}' also reads '{x.name}'"
    if x.target is aten.linear.default and x.meta["val"].ndim != 2:
        return f"it normalises dimension 1, the features of '{x.name}' lie in the last one"
    before = arguments(x)
    matrix = edit.expression(before["weight"])
    bias = None if before["bias"] is None else edit.expression(before["bias"])
    if matrix is None or (before["bias"] is not None and bias is None):
        return f"the weights of '{x.name}' are not constant"
    if x.meta["val"].ndim != len(matrix.shape):
        return f"it normalises dimension 1, '{x.name}' has no batch dimension before its channels"
    if x.target in _TRANSPOSED and before["groups"] != 1:
        return f"'{x.name}' is a transposed convolution with groups={before['groups']}"
    names = matrix.sources
    others = [r for n in names for r in edit.readers[n] if r is not x]
    if others:
        return f"weight '{names[0]}' of '{x.name}' is also read by '{others[0].name}'"
    if touched & set(names):
        return ""
    touched |= set(names)
    mean, var = vectors["running_mean"], vectors["running_var"]
    assert mean is not None
    assert var is not None
    scale = var.rsqrt(given["eps"])
    if vectors["weight"] is not None:
        scale = scale.scale_rows(vectors["weight"])
    moved = ((bias or Derivation.zeros(*mean.shape)) - mean).scale_rows(scale)
    if vectors["bias"] is not None:
        moved = moved + vectors["bias"]
    if x.target in _TRANSPOSED:
        order = (1, 0, *range(2, len(matrix.shape)))
        matrix = matrix.permute(*order).scale_rows(scale).permute(*order)
    else:
        matrix = matrix.scale_rows(scale)
    like = edit.weights[names[0]]
    free = () if bias is None else tuple(n for n in bias.sources if set(edit.readers[n]) == {x})
    with edit.graph.inserting_before(x):
        w = edit.weight(names[0], matrix, like, names)
        b = edit.weight(free[0] if free else f"{names[0].removesuffix('.weight')}.bias", moved, like, free)
        new = call(edit.graph, x.target, x.args[0], w, b, *x.args[3:], like=x, **_without(x.kwargs, "weight", "bias"))
    result = node
    if node.target not in (aten.batch_norm.default, batch_norm):
        firsts = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        if not firsts:
            return ""
        result = firsts[0]
    edit.replace(result, new)
    edit.did(f"{_name(given, node)} -> {names[0].removesuffix('.weight')}")
    return ""


def _without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in names}
