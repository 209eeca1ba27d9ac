"""Where the features of a hidden value lie, through transposes and views, from the products that make it to the one that takes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.mlp.hidden import CASTS, TURNS, VIEWS, Hidden
from recast.patterns.rules import Surroundings
from recast.patterns.sites import Use

__all__ = ["misplaced"]

aten = torch.ops.aten

# What a dimension counts, outermost first: the features, or dimensions of the input; each with its size. Views regroup these
# without changing their order, transposes reorder dimensions as wholes. Nothing for a dimension of size 1.
_Label = tuple[tuple[Any, Any], ...]
_Labels = tuple[_Label, ...]
_FEATURES = "features"
_LIMIT = 12  # views and transposes between the input and a product


def misplaced(hidden: Hidden, use: Use, around: Surroundings) -> str | None:
    """Why the last product does not sum over the features that the first ones give; None if it does.

    Parameters
    ----------
    hidden
        What stands between the products.
    use
        The last product.
    around
        Which values are products.

    Returns
    -------
    str or None
        A sentence. Where no dimension is turned and features come last everywhere, there is nothing to look at.
    """
    leaves = [leaf for leaf in (hidden.gate, hidden.up) if leaf is not None]
    first = [leaf.uses(around)[0][1] for leaf in leaves]
    turns = sorted((n for n in hidden.nodes if n.target in TURNS), key=around.position.__getitem__)
    last = all(u.contraction.y.endswith(u.contraction.outputs) for u in first if u.routing is None)
    if not turns and last and use.contraction.x.endswith(use.contraction.inputs):
        return None
    named = f"'{turns[0].name}' turns dimensions" if turns else "dimensions are turned"
    refused = f"{named} between the products"
    if any(leaf.part for leaf in leaves) or any(u.routing is not None or u.contraction.batch for u in (*first, use)):
        return refused
    known: dict[fx.Node, _Labels] = {}
    sources = set()
    for leaf, made in zip(leaves, first, strict=True):
        source, labels = _entering(made.x, around)
        sources.add(source)
        product = None if labels is None else _product(made, labels)
        if product is None:
            return refused
        known[made.product] = product
        if made.node is not made.product and leaf.product is made.node:  # an added bias
            known[made.node] = product
    if len(sources) > 1:  # nothing tells which rows of one meet which of the other
        return refused
    for node in sorted(set(hidden.nodes) - known.keys(), key=around.position.__getitem__):
        labels = _after(node, known, around)
        if labels is None:
            return refused
        known[node] = labels
    taken = known.get(use.x, ())
    summed = [
        label for letter, label in zip(use.contraction.x, taken, strict=False) if letter in use.contraction.inputs
    ]
    return None if len(summed) == 1 and [what for what, _ in summed[0]] == [_FEATURES] else refused


def _entering(x: fx.Node, around: Surroundings) -> tuple[fx.Node, _Labels | None]:
    """The value that an operand is a view of, and what dimensions of it the operand's are."""
    path: list[fx.Node] = []
    while x.target in TURNS | VIEWS | CASTS and len(path) < _LIMIT and not around.products(x):
        operand = x.args[0]
        if not isinstance(operand, fx.Node):
            break
        path.append(x)
        x = operand
    known = {x: tuple(_label(d, size) for d, size in enumerate(_sizes(x)))}
    for node in reversed(path):
        labels = _after(node, known, around)
        if labels is None:
            return x, None
        known[node] = labels
    return x, known[path[0] if path else x]


def _product(use: Use, x: _Labels) -> _Labels | None:
    letters, outputs = use.contraction.y, use.contraction.outputs
    given = dict(zip(use.contraction.x, x, strict=True))
    if len(outputs) != 1 or len(letters) != len(_sizes(use.product)):
        return None
    sizes = dict(zip(letters, _sizes(use.product), strict=True))
    return tuple(_label(_FEATURES, sizes[d]) if d == outputs else given[d] for d in letters)


def _after(node: fx.Node, known: dict[fx.Node, _Labels], around: Surroundings) -> _Labels | None:
    """What the dimensions of a value count, from those of its operands; None if that cannot be told."""
    computed = [
        n
        for n in node.all_input_nodes
        if n not in around.scope.constants and isinstance(v := n.meta.get("val"), Tensor) and v.is_floating_point()
    ]
    if not computed or any(n not in known for n in computed) or not isinstance(node.meta.get("val"), Tensor):
        return None
    target: Any = node.target
    if target in TURNS:
        before = known[computed[0]]
        marked = torch.empty([d + 2 for d in range(len(before))], device="meta")
        return tuple(before[size - 2] for size in target(marked, *node.args[1:], **node.kwargs).shape)
    if target in VIEWS:
        return _regrouped([atom for label in known[computed[0]] for atom in label], _sizes(node))
    if target is aten.glu.default or not (target in CASTS or torch.Tag.pointwise in target.tags):
        return None
    result: list[_Label] = [()] * len(_sizes(node))
    for n in computed:
        for d, label in enumerate(reversed(known[n])):
            if label and result[-1 - d] and label != result[-1 - d]:
                return None
            result[-1 - d] = label or result[-1 - d]
    return tuple(result)


def _regrouped(atoms: list[tuple[Any, Any]], sizes: Iterable[Any]) -> _Labels | None:
    labels, left = list[_Label](), list(atoms)
    for size in sizes:
        count, taken = 1, list[tuple[Any, Any]]()
        while count != size and left:
            taken.append(left.pop(0))
            count = count * taken[-1][1]
        if count != size:
            return None
        labels.append(tuple(taken))
    return None if left else tuple(labels)


def _label(what: Any, size: Any) -> _Label:
    return () if size == 1 else ((what, size),)


def _sizes(node: fx.Node) -> list[Any]:
    """Sizes as numbers or expressions, which compare without asking anything of the symbols."""
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
