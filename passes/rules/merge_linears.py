"""Merge: linears that read the same value become one product, taken apart after it."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from typing import ClassVar

import torch
from torch import fx

from recast.passes.exact import Edit, ExactPass, call
from recast.passes.follow import moves
from recast.patterns.derivation import Derivation
from recast.patterns.sites import LinearSite, Use

__all__ = ["MergeLinears"]

aten = torch.ops.aten

Product = tuple[LinearSite, Use]


@dataclasses.dataclass(frozen=True)
class MergeLinears(ExactPass):
    """``x W1^T + b1, x W2^T + b2  ->  split(x [W1; W2]^T + [b1; b2])``.

    Parameters
    ----------
    most
        Linears merged into one, at most: a dense mixture of experts reads one value with hundreds, and is left alone.
    across
        Merge linears of different modules too, as attention and MLP beside each other; by default those of one module.
    """

    name: ClassVar[str] = "merge_linears"
    most: int = 8
    across: bool = False

    def apply(self, edit: Edit) -> None:
        """Merge every group of linears whose weights serve this group only."""
        groups = [group for group in _groups(edit, self.across) if len(group) > 1]
        where: dict[str, set[tuple[str, ...]]] = {}
        for group in groups:
            for site, _ in group:
                where.setdefault(site.name, set()).add(_key(group))
        together = Counter(_key(group) for group in groups)
        merged = set[tuple[str, ...]]()
        for group in groups:
            names = [site.name for site, _ in group]
            if reason := self._reason(edit, group, where, together[_key(group)]):
                edit.refuse(" + ".join(names), reason, group[0][1].product)
                continue
            _merge(edit, group)
            if _key(group) not in merged:
                merged.add(_key(group))
                edit.did(f"{' + '.join(names)} -> {_merged_name(names)}")

    def _reason(
        self, edit: Edit, group: list[Product], where: dict[str, set[tuple[str, ...]]], together: int
    ) -> str | None:
        if len(group) > self.most:
            return f"{len(group)} linears read '{group[0][1].x.name}', more than most={self.most}"
        names = [site.name for site, _ in group]
        if len(set(names)) < len(names):
            return "the same matrix is multiplied by the same value twice; run common_subexpressions first"
        for site, _ in group:
            if reason := edit.exclusive(site):
                return f"'{site.name}' cannot move: {reason}"
            if len(where[site.name]) > 1 or any(edit.plain(u) for u in site.uses):
                return f"'{site.name}' is used elsewhere without the others: merged, it would be stored twice"
            if len(site.uses) != together:
                return f"'{site.name}' is used {len(site.uses)} times, {together} of them with the others"
        return None


def _groups(edit: Edit, across: bool) -> list[list[Product]]:
    found: dict[tuple[fx.Node, torch.dtype, str], list[Product]] = {}
    for site in edit.sites:
        for use in site.uses:
            if edit.plain(use) is None:
                module = "" if across else site.name.rpartition(".")[0]
                found.setdefault((use.x, site.dtype, module), []).append((site, use))
    return list(found.values())


def _key(group: list[Product]) -> tuple[str, ...]:
    return tuple(site.name for site, _ in group)


def _merge(edit: Edit, group: list[Product]) -> None:
    names = [site.name for site, _ in group]
    uses = [use for _, use in group]
    matrix = Derivation.cat(*(edit.matrix(use) for use in uses))
    bias = None
    if any(use.bias is not None for use in uses):
        bias = Derivation.cat(*(edit.bias(use) or Derivation.zeros(site.out_features) for site, use in group))
    first = min((use.product for use in uses), key=edit.position.__getitem__)
    site = group[0][0]
    like = torch.empty((), dtype=site.dtype, device=edit.weights[site.weights[0]].device)
    name = _merged_name(names)
    weights = tuple(w for s, _ in group for w in s.weights)
    with edit.graph.inserting_before(first):
        w = edit.weight(f"{name}.weight", matrix, like, weights)
        b = None if bias is None else edit.weight(f"{name}.bias", bias, like)
        y = call(edit.graph, aten.linear.default, edit.now(uses[0].x), w, *(() if b is None else (b,)), like=first)
        sizes = [s.out_features for s, _ in group]
        split = call(edit.graph, aten.split_with_sizes.default, y, sizes, -1, like=first)
        pieces = [call(edit.graph, operator.getitem, split, i, like=u.product) for i, u in enumerate(uses)]
    for use, piece in zip(uses, pieces, strict=True):
        edit.replace(use.node, piece)
        _allow_strides(piece)


def _allow_strides(piece: fx.Node) -> None:
    """Views of what is now a slice of something wider: a reshape copies where the memory does not lie in order."""
    todo = [piece]
    while todo:
        for user in todo.pop().users:
            if user.op == "call_function" and moves(user):
                if user.target in (aten.view.default, aten._unsafe_view.default):
                    user.target = aten.reshape.default
                todo.append(user)


def _merged_name(names: list[str]) -> str:
    """``a.q_proj`` and ``a.k_proj``: ``a.q_k_proj``; the shared folder first, the shared ending once.

    Examples
    --------
    >>> _merged_name(["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.v_proj"])
    'l.0.attn.q_k_v_proj'
    >>> _merged_name(["layer.query", "layer.key"]), _merged_name(["0", "2"])
    ('layer.query_key', '0_2')
    """
    split = [name.split(".") for name in names]
    shared = _common([parts[:-1] for parts in split])
    words = [("_".join(parts[len(shared) :])).replace("#", "_").split("_") for parts in split]
    ending = _common([w[::-1] for w in words])[::-1]
    if any(len(w) == len(ending) for w in words):
        ending = []
    leaves = ["_".join(w[: len(w) - len(ending)]) for w in words]
    return ".".join([*shared, "_".join(leaves + list(ending))])


def _common(lists: list[list[str]]) -> list[str]:
    """What several lists begin with."""
    count = 0
    while all(len(words) > count and words[count] == lists[0][count] for words in lists):
        count += 1
    return lists[0][:count]
