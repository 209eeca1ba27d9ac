"""Fold: low-rank adapters (LoRA, PiSSA) beside a linear go into its matrix."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import reshapes, root_of
from recast.passes.structures import number_of
from recast.patterns.derivation import Derivation
from recast.patterns.sites import LinearSite, Use

__all__ = ["FoldAdapters"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """``factor * (x A^T + a) B^T + b``: the graph's values and the linears."""

    x: fx.Node
    first: tuple[LinearSite, Use]
    second: tuple[LinearSite, Use]
    factor: float


@dataclasses.dataclass(frozen=True)
class FoldAdapters(ExactPass):
    """``x W^T + s (x A^T) B^T  ->  x (W + s B A)^T``."""

    name: ClassVar[str] = "fold_adapters"

    def apply(self, edit: Edit) -> None:
        """Fold every sum of a linear and an adapter with the same input."""
        touched: set[str] = set()
        for node in list(edit.graph.nodes):
            if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2 or edit.product(node):
                continue
            left, right = node.args
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                continue
            for base, side in ((left, right), (right, left)):
                adapter = _adapter(edit, side)
                if adapter is None:
                    continue
                reason = _fold(edit, node, base, adapter, touched)
                if reason is None:
                    break
                if reason:
                    edit.refuse(adapter.second[0].name, reason, node)


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _strip(node: fx.Node) -> fx.Node:
    """A value without the views on it, as far as nothing else reads what is viewed."""
    while reshapes(node) and _alone(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _adapter(edit: Edit, side: fx.Node) -> _Adapter | None:
    factor, node = 1.0, _strip(side)
    while (number := number_of(node)) is not None and _alone(node):
        factor *= number
        node = _strip(node.args[0])  # type: ignore[arg-type]
    second = edit.product(node)
    if second is None or not _alone(node):
        return None
    inner = _strip(second[1].x)
    first = edit.product(inner)
    if first is None or not _alone(inner):
        return None
    rank = first[0].out_features
    if rank >= min(first[0].in_features, second[0].out_features):
        return None  # two full matrices in a row are not an adapter
    return _Adapter(first[1].x, first, second, factor)


def _fold(edit: Edit, node: fx.Node, base: fx.Node, adapter: _Adapter, touched: set[str]) -> str | None:
    """Fold one adapter; None if done, else why not (nothing to tell if this is no adapter after all)."""
    start = _strip(base)
    found = edit.product(start)
    if found is None:
        return ""
    site, use = found
    if root_of(use.x) is not root_of(adapter.x):
        return ""  # the side branch of something else: a bottleneck beside a residual
    if not _alone(start) or not _alone(base):
        return f"'{site.name}' is also read without the adapter"
    for one, its in (found, adapter.first, adapter.second):
        if reason := edit.plain(its):
            return f"'{one.name}': {reason}"
    if reason := edit.exclusive(site, (use,)):
        return f"'{site.name}' cannot take it: {reason}"
    if not _lead(use.x, use.node, node):
        return "the result's leading dimensions are not those of the input"
    if site.name in touched:
        return ""
    touched.add(site.name)
    down, up = (edit.matrix(u) for _, u in (adapter.first, adapter.second))
    matrix = edit.matrix(use) + (up @ down).scale(adapter.factor)
    bias = edit.bias(use) or Derivation.zeros(site.out_features)
    if (inner := edit.bias(adapter.first[1])) is not None:
        bias = bias + (up @ inner).scale(adapter.factor)
    if (outer := edit.bias(adapter.second[1])) is not None:
        bias = bias + outer.scale(adapter.factor)
    with edit.graph.inserting_before(node):
        x = use.x if start is base else root_of(use.x)
        new = edit.linear(site, use, x, matrix, None if bias.op == "zeros" else bias)
    edit.replace(node, new)
    edit.did(f"{adapter.second[0].name} {adapter.first[0].name} -> {site.name}")
    return None


def _lead(x: fx.Node, product: fx.Node, result: fx.Node) -> bool:
    """Whether the sum has the leading dimensions of what the linear will read."""
    shape = [str(s) for s in result.meta["val"].shape[:-1]]
    return any([str(s) for s in n.meta["val"].shape[:-1]] == shape for n in (x, root_of(x)))
