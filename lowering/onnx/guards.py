"""Attention that was exported with a test of every weight for NaN: the rows it is meant for are known from the mask.

torch's exporters end a masked softmax with ``where(isnan(weights), 0, weights)``, because a row without any key is NaN when masks
are minus infinity. Two passes over all weights, for rows that are known from the mask: here the mask is kept finite, and what such
a row gives is multiplied by zero, as in attention that recast exports itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.onnx.fuse import finite_mask, splice
from recast.patterns.program import Program

__all__ = ["drop_guards"]

aten = torch.ops.aten
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.view.default, aten.reshape.default}


def drop_guards(program: Program) -> None:
    """Rewrite in place; equal for all inputs whose scores are numbers."""
    masks: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for guard in list(program.graph.nodes):
        softmax = _guarded(guard)
        if softmax is None:
            continue
        scores: fx.Node = softmax.args[0]  # type: ignore[assignment]
        product = _product(guard)
        mask = _mask_of(scores)
        if mask is None and _scores(scores):
            guard.replace_all_uses_with(softmax)  # nothing is masked: no row is empty
        elif mask is not None and product is not None:
            _rewrite(program, guard, softmax, mask, product, masks)
        else:
            continue
        test = guard.args[0]
        program.graph.erase_node(guard)
        program.graph.erase_node(test)


def _guarded(node: fx.Node) -> fx.Node | None:
    """The softmax whose NaNs become zero, if that is what a value is."""
    if node.target is not aten.where.ScalarSelf:
        return None
    test, zero, softmax = node.args
    if (
        not isinstance(test, fx.Node)
        or test.target is not aten.isnan.default
        or test.args[0] is not softmax
        or zero != 0
    ):
        return None
    if not isinstance(softmax, fx.Node) or softmax.target is not aten.softmax.int or len(test.users) != 1:
        return None
    last = softmax.meta["val"].dim() - 1
    whole = set(softmax.users) == {test, node} and softmax.args[1] in (-1, last)
    return softmax if whole and softmax.meta["val"].dtype == torch.float32 else None


def _product(guard: fx.Node) -> fx.Node | None:
    """The only user, if it is the product with the values."""
    users = list(guard.users)
    if len(users) != 1 or users[0].target not in _PRODUCTS or users[0].args[0] is not guard:
        return None
    return users[0]


def _scores(node: Any) -> bool:
    """Whether a value is a product of queries and keys, scaled or laid out anew."""
    while isinstance(node, fx.Node) and node.target in _SCALES:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _PRODUCTS


def _mask_of(scores: fx.Node) -> fx.Node | None:
    """What is added to the product of queries and keys."""
    if scores.target is not aten.add.Tensor or scores.kwargs or len(scores.users) != 1:
        return None
    left, right = scores.args
    for product, mask in ((left, right), (right, left)):
        if (
            _scores(product)
            and isinstance(mask, fx.Node)
            and isinstance(mask.meta.get("val"), Tensor)
            and not _scores(mask)
        ):
            return mask if mask.meta["val"].dtype == torch.float32 else None
    return None


def _rewrite(
    program: Program,
    guard: fx.Node,
    softmax: fx.Node,
    mask: fx.Node,
    product: fx.Node,
    masks: dict[fx.Node, tuple[fx.Node, ...]],
) -> None:
    if mask not in masks:
        masks[mask] = finite_mask(program, mask)
    added, *seen = masks[mask]
    scores: fx.Node = softmax.args[0]  # type: ignore[assignment]
    scores.args = tuple(added if operand is mask else operand for operand in scores.args)
    guard.replace_all_uses_with(softmax)
    if not seen:  # the mask is finite: every row has a key
        return
    result = splice(program, product, lambda y, rows: y * rows, [product, *seen], after=True)
    product.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
