"""Attention whose scores are put together from pieces (bands, blocks): the linears around it are named, its core is left as it is.

Between the product of queries with keys and the product with the values may stand anything but another product of activations
or a linear: windows cut out and written back, paddings, gathers, sums of several scores.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, fx

from recast.patterns.attention.site import common_module, made_by, taken_by
from recast.patterns.language import Match
from recast.patterns.linear.find import product_flops
from recast.patterns.linear.packing import size_hint
from recast.patterns.rules import Surroundings
from recast.patterns.sites import AttentionSite, source_line

__all__ = ["build"]

_FAR = 250  # values between the normaliser and a product
_PIECES = {
    "slice_scatter",
    "select_scatter",
    "index_put",
    "scatter",
    "copy",
    "as_strided",
    "pad",
    "constant_pad_nd",
    "stack",
}


def build(match: Match, around: Surroundings) -> AttentionSite | str:
    """Name the linears around a normaliser that no spelling of attention took in, or say which is missing.

    Empty if nothing is put together there: a spelling that nearly matched has more to say.
    """
    normaliser = match.root
    above: set[fx.Node] = set()
    candidates = _products(normaliser, around, above)
    product = next(iter(_products(normaliser, around)), None)
    if not candidates or product is None or not any(_name(n) in _PIECES for n in above):
        return ""
    # A product of masks, made to say which places a band has, is one of activations too.
    made = [c for c, _ in candidates if all(made_by(n, around)[0] is not None for n in _operands(c)[:2])]
    scores = made[0] if made else candidates[0][0]
    query, key, *_ = _operands(scores)
    values = [n for n in _operands(product[0]) if n is not product[1]]
    if not values:
        return "what is normalised is multiplied with itself"
    found = {"q": made_by(query, around)[0], "k": made_by(key, around)[0], "v": made_by(values[0], around)[0]}
    found["o"] = taken_by(product[0], around)
    if missing := [role for role, piece in found.items() if piece is None]:
        return f"no linear is found for {', '.join(missing)}"
    pieces = [piece for piece in found.values() if piece is not None]
    if len({(piece.site.name, piece.part) for piece in pieces[:3]}) == 1 and not pieces[0].site.parts:
        return f"queries, keys and values are all '{pieces[0].name}'"
    nodes = sorted({scores, normaliser, product[0]}, key=around.position.__getitem__)
    shape = query.meta["val"].shape
    return AttentionSite(
        name=common_module(pieces, product[0]),
        weights=tuple(dict.fromkeys(w for piece in pieces for w in piece.weights)),
        node=product[0],
        nodes=tuple(nodes),
        pattern="attention_in_pieces",
        where=source_line(product[0]),
        q=found["q"],
        k=found["k"],
        v=found["v"],
        o=found["o"],
        query=query,
        key=key,
        value=values[0],
        head_dim=size_hint(shape[-1]),
        value_dim=size_hint(values[0].meta["val"].shape[-1]),
        notes=("not raised: its scores are put together from pieces",),
    )


def _products(start: fx.Node, around: Surroundings, above: set[fx.Node] | None = None) -> list[tuple[fx.Node, fx.Node]]:
    """Products of activations below, nearest first, each with the value through which it is reached.

    With `above` it is those on the way up, and the values passed are put there.
    """
    seen, queue, up = {start}, deque([start]), above is not None
    found: dict[fx.Node, fx.Node] = {}
    while queue and len(seen) < _FAR:
        node = queue.popleft()
        for other in node.all_input_nodes if up else list(node.users):
            value: Any = other.meta.get("val")
            if other in seen or other.op != "call_function" or not isinstance(value, Tensor | tuple | list):
                continue
            if other in around.scope.constants or around.products(other) or around.part_of("norm", other) is not None:
                continue
            if product_flops(other):
                if len([n for n in _operands(other) if n not in around.scope.constants]) > 1:
                    found.setdefault(other, node)
                continue
            seen.add(other)
            queue.append(other)
            if above is not None:
                above.add(other)
    return list(found.items())


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", ""))


def _operands(node: fx.Node) -> list[fx.Node]:
    read = node.all_input_nodes[1:] if _name(node) == "baddbmm" else node.all_input_nodes
    return [n for n in read if isinstance(n.meta.get("val"), Tensor)]
