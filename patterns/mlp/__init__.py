"""Feed-forward blocks: two or three linears that share a hidden width, with an activation between them."""

from __future__ import annotations

import itertools

from torch import Tensor, fx

from recast.patterns.language import Call, Match
from recast.patterns.linear.find import product_flops
from recast.patterns.mlp.hidden import ACTIVATIONS, Leaf, read_hidden
from recast.patterns.mlp.turned import misplaced
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import MLPSite, Piece, source_line

__all__ = ["RULES", "common_name"]

_STEPS = 40  # from an activation to the product that takes it


def common_name(names: list[str], otherwise: str) -> str:
    """The dotted path that names share.

    Examples
    --------
    >>> common_name(["layers.0.mlp.up", "layers.0.mlp.down"], "x"), common_name(["0", "2"], "0+2")
    ('layers.0.mlp', '0+2')
    """
    split = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda components: len(set(components)) == 1, zip(*split, strict=False))
    return ".".join(components[0] for components in shared) or otherwise


def _build(match: Match, around: Surroundings) -> MLPSite | str:
    start = match.root
    if (mixture := around.part_of("moe", start)) is not None:
        return f"part of the mixture of experts '{mixture.name}'"
    takers = _takers(start, around)
    if not takers:
        return "its result enters no linear"
    if len(takers) > 1:
        names = " and ".join(sorted(around.products(n)[0][0].name for n in takers))
        return f"its result enters {names}, a block has one last linear"
    pairs = around.products(takers[0])
    site, use = pairs[0]
    if len(pairs) > 1:
        return f"its result enters a stack of {len(pairs)} matrices, which belongs to no mixture of experts known here"
    hidden = read_hidden(use.x, around, turned=True)
    if isinstance(hidden, str):
        return hidden
    if (wrong_way := misplaced(hidden, use, around)) is not None:
        return wrong_way
    if start not in hidden.nodes:
        return f"it enters '{site.name}' beside the hidden values, not among them"
    gate, up = _piece(hidden.gate, around), _piece(hidden.up, around)
    if isinstance(gate, str) or isinstance(up, str) or up is None:
        return gate if isinstance(gate, str) else str(up)
    down = Piece(site)
    wrong = [p for p in (gate, up) if p is not None and p.shape[0] != site.in_features and hidden.gate != hidden.up]
    if wrong:
        return f"'{wrong[0].name}' has {wrong[0].shape[0]} features, '{site.name}' takes {site.in_features}"
    products = {hidden.up.product, *([hidden.gate.product] if hidden.gate else [])}
    inside = {
        *hidden.nodes,
        *products,
        use.node,
        use.product,
        *(u.node for p in products for _, u in around.products(p)),
    }
    if outside := next((n for n in (*products, *hidden.nodes) if any(u not in inside for u in n.users)), None):
        return f"'{outside.name}', a hidden value, is used outside of the block too"
    pieces = [p for p in (gate, up, down) if p is not None]
    nodes = sorted(inside, key=around.position.__getitem__)
    (first, *_) = hidden.up.uses(around)
    return MLPSite(
        name=common_name([p.site.name for p in pieces], "+".join(dict.fromkeys(p.site.name for p in pieces))),
        weights=tuple(dict.fromkeys(w for p in pieces for w in p.weights)),
        gate=gate,
        up=up,
        down=down,
        activation=hidden.activation,
        x=first[1].x,
        node=use.node,
        nodes=tuple(nodes),
        pattern="mlp",
        where=source_line(use.product),
    )


def _piece(leaf: Leaf | None, around: Surroundings) -> Piece | str | None:
    if leaf is None:
        return None
    pairs = leaf.uses(around)
    if len(pairs) > 1:
        return f"it is made by a stack of {len(pairs)} matrices"
    return Piece(pairs[0][0], leaf.part)


def _takers(start: fx.Node, around: Surroundings) -> list[fx.Node]:
    """Products that an activation leads to, the nearest."""
    seen, queue = {start}, [start]
    found: dict[fx.Node, None] = {}
    while queue and len(seen) < _STEPS:
        node = queue.pop(0)
        for user in node.users:
            products = around.products(user)
            if products and any(use.x is node for _, use in products):
                found[user] = None
            elif user not in seen and user.op == "call_function" and not product_flops(user) and not products:
                seen.add(user)
                queue.append(user)
        if found:
            break
    return list(found)


def _suspicious(node: fx.Node, around: Surroundings) -> bool:
    """An activation right after a linear, whose result enters another, outside of mixtures and of blocks found."""
    if around.part_of("moe", node) is not None:
        return False
    source = node
    for _ in range(7):  # the operand that is no constant: a bias may come first
        source = next((n for n in source.all_input_nodes if n not in around.scope.constants), source)
        if around.products(source):
            break
    if source is node or not around.products(source):
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    widths = {around.products(product)[0][0].in_features for product in _takers(node, around)}
    return isinstance(value.shape[-1], int) and value.shape[-1] in widths  # as wide as what is taken: no lone gate


RULES = (Rule("mlp", "mlp", Call(ACTIVATIONS), _build, ACTIVATIONS, _suspicious, order=50),)
