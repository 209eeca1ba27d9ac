"""Split: a product that is taken apart at once becomes several; the inverse of `merge_linears`."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

import torch
from torch import fx

from recast.passes.exact import Edit, ExactPass, call
from recast.passes.follow import keeps_features, numbered, run_on
from recast.patterns.linear.packing import size_hint
from recast.patterns.sites import LinearSite, Use

__all__ = ["SplitPacked"]

aten = torch.ops.aten
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclasses.dataclass(frozen=True)
class SplitPacked(ExactPass):
    """``split(x [W1; W2]^T + [b1; b2])  ->  x W1^T + b1, x W2^T + b2``."""

    name: ClassVar[str] = "split_packed"
    undoes: ClassVar[tuple[str, ...]] = ("merge_linears",)

    def apply(self, edit: Edit) -> None:
        """Split every packed linear that is taken apart along its features."""
        for site in edit.sites:
            if not site.parts:
                continue
            reasons = [edit.plain(use) or edit.exclusive(site) for use in site.uses]
            taken = [_taken(use) for use in site.uses]
            reason = next((r for r in [*reasons, *(t for t in taken if isinstance(t, str))] if r), None)
            if reason is not None:
                edit.refuse(site.name, reason, site.uses[0].product)
                continue
            names = [f"{site.name}.{part.name}" for part in site.parts]
            for use, chain in zip(site.uses, taken, strict=True):
                assert not isinstance(chain, str)
                _split(edit, site, use, chain, names)
            edit.did(f"{site.name} -> {', '.join(names)}")


def _taken(use: Use) -> list[fx.Node] | str:
    """Reshapes that keep the features, then the split, the last of the chain."""
    chain: list[fx.Node] = []
    node = use.node
    while True:
        if len(node.users) != 1:
            return f"'{node.name}' is read in {len(node.users)} places, not taken apart by one split"
        node = next(iter(node.users))
        chain.append(node)
        if node.target in _SPLITS:
            break
        if node.target not in _RESHAPES or not keeps_features(node):
            return f"it is rearranged by '{node.name}' before it is taken apart"
    last = node.args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if int(dim) % (last + 1) != last:  # type: ignore[arg-type]
        return f"'{node.name}' takes it apart along another dimension than its features"
    if any(user.target is not operator.getitem for user in node.users):
        return f"the pieces of '{node.name}' are not read one by one"
    return chain


def _split(edit: Edit, site: LinearSite, use: Use, chain: list[fx.Node], names: list[str]) -> None:
    graph, matrix, bias = edit.graph, edit.matrix(use), edit.bias(use)
    like = torch.empty((), dtype=site.dtype, device=edit.weights[site.weights[0]].device)
    split = chain[-1]
    numbers = numbered(use.node)
    for node in chain:
        numbers = run_on(node, numbers)
    results: dict[int, fx.Node] = {}
    with graph.inserting_before(use.product):
        for i, piece in enumerate(numbers):
            rows = piece.flatten()[: piece.shape[-1]].tolist()
            span = (rows[0], rows[-1] + 1)
            name = names[i] if len(names) == len(numbers) else f"{site.name}.{i}"
            w = edit.weight(f"{name}.weight", matrix.rows(span), like)
            b = () if bias is None else (edit.weight(f"{name}.bias", bias.rows(span), like),)
            y = call(graph, aten.linear.default, edit.now(use.x), w, *b, like=use.product)
            results[i] = y
    with graph.inserting_before(split):
        for i, y in results.items():
            for node in chain[:-1]:
                sizes = [*node.args[1][:-1], size_hint(numbers[i].shape[-1])]  # type: ignore[index, misc]
                y = call(graph, aten.reshape.default, y, sizes, like=node)
            results[i] = y
    for user in list(split.users):
        edit.replace(user, results[int(user.args[1])])  # type: ignore[arg-type]
