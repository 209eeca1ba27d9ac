"""Where queries meet keys: what must agree, and what holds a number for each of their features chosen from as well."""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from recast.passes.exact import Edit, call
from recast.passes.follow import is_cast, moves
from recast.passes.modules.block import Block
from recast.passes.modules.flow import Picks, Refused, Way, stays
from recast.passes.modules.marks import BLOCK
from recast.patterns.derivation import Derivation
from recast.patterns.sites import AttentionSite

__all__ = ["agree", "meet"]

aten = torch.ops.aten


def agree(block: Block, way: Way) -> None:
    """Refuse queries and keys whose features do not meet as their labels say."""
    for site in block.sites:
        assert isinstance(site, AttentionSite)
        if site.query not in way or site.key not in way:
            raise Refused("its queries or keys cannot be told from the graph")
        query, key = way[site.query], way[site.key]
        if block.product(site).target is not aten.scaled_dot_product_attention.default:
            key = key.transpose(-2, -1)
        query, key = query[..., 0, :], key[..., 0, :]  # (..., heads, features)
        if query.ndim > 2 and key.shape[-2] != query.shape[-2]:
            key = key.repeat_interleave(query.shape[-2] // key.shape[-2], -2)
        if not torch.equal(torch.broadcast_to(query, key.shape), key):
            raise Refused("features of queries do not meet those of keys in the order of the matrices")


def meet(edit: Edit, block: Block, way: Way, picks: Picks, kept: Tensor) -> dict[str, Tensor]:
    """Put right what stands between the linears of queries and keys and their product, besides sizes.

    The scale stays that of the head as it was. What elementwise steps apply to each feature is chosen from, for each head.

    Returns
    -------
    For queries and keys, by name of the value, which features are left, along the dimensions that tell them apart.
    """
    chosen: dict[tuple[int, ...], Derivation] = {}
    for node, operands in picks.items():
        for operand in operands:
            _choose(edit, block, node, operand, stays(way[node], kept.to(torch.int32)), chosen)
    left: dict[str, Tensor] = {}
    for site in block.sites:
        assert isinstance(site, AttentionSite)
        product = block.product(site)
        if product.target is aten.scaled_dot_product_attention.default:
            if product.kwargs.get("scale") is None:
                product.kwargs = {**product.kwargs, "scale": site.scale}
            _reshape_behind(product)
        for entering in (site.query, site.key):
            assert entering is not None
            mask = stays(way[entering], kept.to(torch.int32))
            for axis in range(mask.ndim):
                if bool((mask == mask.narrow(axis, 0, 1)).all()):
                    mask = mask.narrow(axis, 0, 1)
            left[entering.name] = mask.clone()
    return left


def _reshape_behind(product: fx.Node) -> None:
    """Let views of an attention's result be reshapes: it may be laid out differently when queries are narrower."""
    todo = [product]
    while todo:
        for user in todo.pop().users:
            if user.target in (aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            if user.op == "call_function" and (moves(user) or is_cast(user)):
                todo.append(user)


def _choose(
    edit: Edit, block: Block, node: fx.Node, operand: fx.Node, mask: Tensor, chosen: dict[tuple[int, ...], Derivation]
) -> None:
    """Let a step read, of what holds a number for each feature, those of the features that are left."""
    rank = mask.ndim
    told = [axis for axis in range(rank - 1) if not bool((mask == mask.narrow(axis, 0, 1)).all())]
    if len(told) > 1:
        raise Refused(f"'{operand.name}' would have to be chosen from for more than heads apart")
    table = mask.movedim(told[0], -2) if told else mask
    table = table[(0,) * (rank - 2)] if told else table[(0,) * (rank - 1)].unsqueeze(0)  # (heads, features)
    places = table.nonzero()[:, 1]
    value = operand.meta["val"]
    back = told[0] - rank if told else 0  # where heads are, counted from the last dimension
    ndim = value.ndim
    with edit.graph.inserting_before(node):
        made = [edit.weight(_path(block), _order(edit, block, places, chosen), torch.empty(0, dtype=torch.int64))]
        found = operand
        if told and ndim >= -back:  # the same for all heads, which it has a dimension of size 1 for
            found, ndim = call(edit.graph, aten.select.int, found, ndim + back, 0, like=node), ndim - 1
            made.append(found)
        made.append(call(edit.graph, aten.index_select.default, found, ndim - 1, made[0], like=node))
        if told:
            split = [table.shape[0], len(places) // table.shape[0]]
            made.append(call(edit.graph, aten.unflatten.int, made[-1], ndim - 1, split, like=node))
            order = [*range(ndim - 1), ndim]  # all but heads
            order.insert(ndim + 1 + back, ndim - 1)
            made.append(call(edit.graph, aten.permute.default, made[-1], order, like=node))
    for new in made:
        new.meta[BLOCK] = block.name
    node.replace_input_with(operand, made[-1])


def _path(block: Block) -> str:
    return re.sub(r"[^\w.]", "_", block.sites[0].name) + ".features_kept"


def _order(edit: Edit, block: Block, places: Tensor, chosen: dict[tuple[int, ...], Derivation]) -> Derivation:
    """Numbers of features as a weight of the program; the same numbers are one weight."""
    key = tuple(places.tolist())
    if key not in chosen:
        made = Derivation.fitted(f"features kept in {block.name} ({len(chosen) + 1})", (len(key),))
        chosen[key], edit.values[made] = made, places.clone()
    return chosen[key]
