"""Stacks of matrices that all meet the same activation: experts that every token visits, written as one product."""

from __future__ import annotations

import dataclasses
import operator
from collections import deque

import torch
from torch import fx

from recast.patterns.constants import Constants
from recast.patterns.linear.spellings import SPELLINGS, spell
from recast.patterns.sites import Use

__all__ = ["stacked"]

aten = torch.ops.aten

_ROOM = 40  # values looked at between two products of an expert
_SPLITS = {
    operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.slice.Tensor,
    aten.select.int, aten.clone.default, aten._to_copy.default,
}  # fmt: skip


def stacked(use: Use, constants: Constants) -> Use:
    """Take ``ti,eio->teo`` for one product with each matrix of ``eio`` where a stack of as many matrices follows.

    By itself it is one product with a matrix of ``e * o`` rows, as a projection to attention heads is. What tells the two apart is
    whether `e` goes on to number matrices: then these are the experts of a mixture, each with a matrix of its own.
    """
    contraction = use.contraction
    number = contraction.w[:1]
    if (
        use.routing is not None
        or contraction.batch
        or len(contraction.outputs) < 2
        or number not in contraction.outputs
    ):
        return use
    if not _numbers_matrices(use.node, use.weight_shape[0], constants):
        return use
    return dataclasses.replace(use, contraction=dataclasses.replace(contraction, stack=number))


def _numbers_matrices(node: fx.Node, count: int, constants: Constants) -> bool:
    """Whether a result goes, value by value, into a product with a stack of `count` matrices."""
    seen, queue = {node}, deque([node])
    while queue and len(seen) < _ROOM:
        for user in queue.popleft().users:
            if user in seen or user.op != "call_function":
                continue
            if user.target in SPELLINGS:
                found = spell(user, constants)
                if isinstance(found, Use) and found.x in seen and len(found.contraction.paired) == 1:
                    sizes = dict(zip(found.contraction.w, found.weight_shape, strict=True))
                    if sizes[found.contraction.paired] == count:
                        return True
            elif user.target in _SPLITS or _by_value(user):
                seen.add(user)
                queue.append(user)
    return False


def _by_value(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
