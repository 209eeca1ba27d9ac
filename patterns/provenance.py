"""Where a value comes from and where it goes, in terms of linear sites: walks that stop at products."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from recast.patterns.linear.find import product_flops
from recast.patterns.rules import Surroundings
from recast.patterns.sites import LinearSite, Piece, Use

__all__ = ["Origin", "follows", "origins", "piece_read"]

aten = torch.ops.aten


class Origin:
    """A product that a value is made of, with the path from it: ``path[0]`` reads the product, ``path[-1]`` is the value."""

    def __init__(self, site: LinearSite, use: Use, path: list[fx.Node]) -> None:
        self.site, self.use, self.path = site, use, path


def origins(
    value: fx.Node,
    around: Surroundings,
    *,
    stop: Callable[[fx.Node], bool] = lambda node: False,
    limit: int = 400,
) -> list[Origin]:
    """Linear sites whose products a value is computed from without another product between, nearest first.

    Parameters
    ----------
    value
        Where to start; if it is itself a product, it is its own origin.
    around
        Which values are products.
    stop
        Values not to walk beyond.
    limit
        Values looked at, at most.
    """
    found: dict[str, Origin] = {}
    paths: dict[fx.Node, fx.Node | None] = {value: None}
    queue = deque([value])
    while queue and len(paths) < limit:
        node = queue.popleft()
        products = around.products(node)
        if products:
            site, use = products[0]
            path, at = [], paths[node]
            while at is not None:
                path.append(at)
                at = paths[at]
            found.setdefault(site.name, Origin(site, use, path))
            continue
        if node.op != "call_function" or product_flops(node) or stop(node) or node in around.scope.constants:
            continue
        for operand in node.all_input_nodes:
            if operand not in paths and isinstance(operand.meta.get("val"), Tensor | tuple | list):
                paths[operand] = node
                queue.append(operand)
    return list(found.values())


def follows(
    value: fx.Node,
    around: Surroundings,
    *,
    through: Callable[[fx.Node], bool] = lambda node: True,
    limit: int = 200,
) -> list[tuple[LinearSite, Use]]:
    """Linear sites that a value enters as the activation, without another product between, nearest first."""
    entering: dict[str, tuple[LinearSite, Use]] = {}
    seen, queue = {value}, deque([value])
    while queue and len(seen) < limit:
        node = queue.popleft()
        for user in node.users:
            products = [(site, use) for site, use in around.products(user) if use.x is node]
            if products:
                entering.setdefault(products[0][0].name, products[0])
            elif user not in seen and user.op == "call_function" and not product_flops(user) and through(user):
                seen.add(user)
                queue.append(user)
    return list(entering.values())


def piece_read(origin: Origin) -> Piece:
    """The part of a packed product that a path reads, or all of it.

    The path is run on row numbers, as `packed_parts` does, until something other than a view or a split follows.
    """
    from recast.patterns.linear.packing import rows_read

    site = origin.site
    if not site.parts:
        return Piece(site)
    rows = rows_read(origin.use, origin.path)
    if rows is None:
        return Piece(site)
    for part in site.parts:
        own = {r for start, stop in part.rows for r in range(start, stop)}
        if rows <= own:
            return Piece(site, part.name)
    return Piece(site)


def single(pieces: Iterable[Piece]) -> Piece | None:
    """The only piece, or None."""
    found = list(dict.fromkeys(pieces))
    return found[0] if len(found) == 1 else None
