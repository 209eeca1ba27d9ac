"""The experts' half of a mixture: products that routed tokens enter, paired up by expert."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.linear.find import product_flops
from recast.patterns.mlp.hidden import Hidden, read_hidden
from recast.patterns.moe.routing import FRESH, Router, values_read
from recast.patterns.rules import Surroundings
from recast.patterns.sites import LinearSite, Piece

__all__ = ["Experts", "Tokens", "latents", "read_experts", "read_tokens", "weighed"]

aten = torch.ops.aten

_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.transpose.int,
    aten.permute.default, aten.t.default, aten._to_copy.default, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.type_as.default,
}  # fmt: skip
_SPREADS = {
    aten.repeat.default, aten.repeat_interleave.self_int, aten.repeat_interleave.Tensor, aten.slice.Tensor,
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.masked_fill.Scalar, aten.cat.default, aten.constant_pad_nd.default, aten.stack.default,
}  # fmt: skip
_CHOSEN = {
    aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.mul.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.bmm.default, aten.matmul.default, aten.mm.default, aten.einsum.default,
    aten.index_put.default, aten.scatter.src, aten.scatter_add.default, aten.index_add.default, aten.index_copy.default,
    aten.masked_fill.Scalar, aten.masked_select.default, aten.split_with_sizes.default,
}  # fmt: skip
_ROWS = {aten.index.Tensor, aten.index_select.default}
_MATMULS = {aten.bmm.default, aten.matmul.default, aten.mm.default, aten.einsum.default}
_ROOM = 60  # values looked at for each expert


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What is routed, as it is and as it is sent to experts.

    Attributes
    ----------
    x
        What enters the router, before views and casts.
    plain, sent
        Values that show all tokens, and those that a router's choice took part in.
    """

    x: fx.Node
    plain: dict[fx.Node, None]
    sent: dict[fx.Node, None]


@dataclasses.dataclass(frozen=True)
class Experts:
    """Experts by number, and how tokens reach them.

    Attributes
    ----------
    by_role
        For each expert its linears.
    shared
        The same for those that every token visits.
    dispatch, activation
        See `recast.patterns.sites.MoESite`.
    nodes
        Values that compute them and combine what they give, shared ones left out.
    note
        What is unusual about them.
    """

    by_role: tuple[dict[str, Piece], ...]
    shared: tuple[dict[str, Piece], ...]
    dispatch: str
    activation: str
    nodes: set[fx.Node]
    note: str = ""


def latents(router: Router, tokens: Tokens, around: Surroundings) -> list[fx.Node]:
    """What linears make of the tokens: experts may work on fewer features than the router sees."""
    firsts = (n for n in _entered(tokens.plain, around) if n is not router.use.product)
    return [around.products(n)[0][1].node for n in firsts if len(around.products(n)) == 1]


def read_tokens(router: Router, around: Surroundings, entrance: fx.Node, latent: fx.Node | None = None) -> Tokens:
    """Follow what enters the router (`entrance`), or a linear's result of it (`latent`), to every form in which it enters experts."""
    x = entrance
    while x.op == "call_function" and x.target in _VIEWS and isinstance(x.args[0], fx.Node) and not around.products(x):
        x = x.args[0]
    plain, sent = {x: None}, dict[fx.Node, None]()
    if latent is not None:
        plain |= _made_of(latent, around)
    queue = deque(plain)
    while queue:
        node = queue.popleft()
        for user in node.users:
            if user in plain or user in sent or user.op != "call_function" or around.products(user):
                continue
            read = values_read(user)
            if node not in read:
                continue
            others = [n for n in read if n not in plain and n not in sent]
            chosen = any(n in router.cone for n in others)
            if not all(_beside(n, router, around) for n in others):
                continue
            getitem = getattr(user.target, "__name__", "") == "getitem"
            # Rows taken by numbers that no value decides are the same tokens again, once for each of their experts.
            repeated = user.target in _ROWS and user.args[0] is node
            if user.target in _VIEWS | _SPREADS or getitem or repeated or (chosen and user.target in _CHOSEN):
                moved = chosen or any(n in sent for n in read)
                (sent if moved else plain)[user] = None
                queue.append(user)
    return Tokens(x, plain, sent)


def _made_of(latent: fx.Node, around: Surroundings) -> dict[fx.Node, None]:
    """Values made of one value and of constants, by no product: a norm of it, most often."""
    found = {latent: None}
    queue = deque([latent])
    while queue and len(found) < _ROOM:
        for user in queue.popleft().users:
            if user in found or user.op != "call_function" or around.products(user) or product_flops(user):
                continue
            others = (n for n in user.all_input_nodes if n not in found and n not in around.scope.constants)
            if isinstance(user.meta.get("val"), Tensor) and not any(True for _ in others):
                found[user] = None
                queue.append(user)
    return found


def _beside(node: fx.Node, router: Router, around: Surroundings) -> bool:
    value = node.meta.get("val")
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return node in router.cone or node in around.scope.constants or node.target in FRESH or not floating


def read_experts(router: Router, tokens: Tokens, around: Surroundings) -> Experts | str:
    """Pair up the linears of every expert, or say what stands in the way."""
    lasts = weighed(router, tokens, around)
    firsts = [n for n in _entered(tokens.sent, around) if n not in lasts]
    for first in firsts:
        lasts.update(dict.fromkeys(_next(first, tokens, router, around)))
    lasts.pop(router.use.node, None)
    lasts.pop(router.use.product, None)
    if not lasts:
        if len(weighed(router, tokens, around, firsts=True)) > 1:
            return "what is weighed comes from one linear each; an expert as known here has two, with hidden values between"
        return "no linears follow from the choice: what is chosen are no experts"
    found: list[tuple[tuple[Any, ...], dict[str, Piece]]] = []
    nodes: set[fx.Node] = set()
    activations: dict[str, None] = {}
    reasons: list[str] = []
    for last in lasts:
        pairs = around.products(last)
        hidden = read_hidden(pairs[0][1].x, around, lambda n: n in router.cone)
        reason = hidden if isinstance(hidden, str) else _stray(hidden, tokens, around)
        if isinstance(hidden, str) or reason is not None:
            reasons.append(f"'{pairs[0][0].name}': {reason}")
            continue
        activations[hidden.activation] = None
        products = {hidden.up.product, *([hidden.gate.product] if hidden.gate is not None else [])}
        nodes |= {*hidden.nodes, *products, last, *(u.product for u in (pairs[0][1],))}
        roles = _roles(last, hidden, around)
        if isinstance(roles, str):
            return roles
        found += roles
    apart = "" if found else _apart(firsts, list(lasts), found, nodes, around)
    if not found:
        return "no expert is made of linears as known here: " + "; ".join(reasons[:2])
    found.sort(key=lambda item: item[0])
    shared, common = _shared(router, tokens, around, nodes)
    nodes |= _between(router, tokens, around, nodes, common)
    return Experts(
        tuple(by_role for _, by_role in found),
        shared,
        _dispatch(router, tokens, found, around),
        " or ".join(activations),
        nodes,
        apart,
    )


def _apart(
    firsts: list[fx.Node],
    lasts: list[fx.Node],
    found: list[tuple[tuple[Any, ...], dict[str, Piece]]],
    nodes: set[fx.Node],
    around: Surroundings,
) -> str:
    """Experts of two linears with something larger than an activation between (mixtures of attention heads), paired by number."""

    def numbered(products: list[fx.Node]) -> dict[int, LinearSite]:
        sites = [(site, use) for product in products for site, use in around.products(product)]
        last = {site.name: [int(n) for n in re.findall(r"\d+", site.name)][-1:] for site, _ in sites}
        return {use.index if use.index is not None else (last[site.name] or [-1])[0]: site for site, use in sites}

    ins, outs = numbered(firsts), numbered(lasts)
    if len(ins) < 2 or set(ins) != set(outs) or len({s.shape for s in ins.values()} | {None}) > 2:
        return ""
    found += [((number,), {"in": Piece(ins[number]), "out": Piece(outs[number])}) for number in sorted(ins)]
    nodes |= {*firsts, *lasts}
    return "something else than an activation lies between the two linears of an expert"


def weighed(router: Router, tokens: Tokens, around: Surroundings, *, firsts: bool = False) -> dict[fx.Node, None]:
    """Products whose results are weighted or put back by the router's choice; with `firsts`, those that tokens enter too."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    queue: deque[fx.Node] = deque()
    for node in router.cone:
        for user in node.users:
            if user.op != "call_function" or user in router.cone or user in tokens.sent:
                continue
            if around.products(user):  # weights looked up, or rows in runs: both products of an expert
                queue.append(user)
            else:
                queue.extend(n for n in user.all_input_nodes if n not in router.cone)
    limit = _ROOM * max(4, router.site.out_features)
    while queue and len(seen) < limit:
        node = queue.popleft()
        if node in seen or node in tokens.plain or node in tokens.sent or node in router.cone:
            continue
        seen.add(node)
        if node.op != "call_function" or node in around.scope.constants or node.target in FRESH:
            continue
        if products := around.products(node):
            _, use = products[0]
            entered = use.x in tokens.plain or use.x in tokens.sent
            if firsts or not entered:
                found.setdefault(use.product)
            continue
        if not product_flops(node) or node.target in _MATMULS:
            queue.extend(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor | tuple | list))
    return found


def _entered(values: dict[fx.Node, None], around: Surroundings) -> list[fx.Node]:
    """Products that some values enter."""
    found: dict[fx.Node, None] = {}
    for node in values:
        for user in node.users:
            if (products := around.products(user)) and products[0][1].x is node:
                found.setdefault(products[0][1].product)
    return list(found)


def _next(first: fx.Node, tokens: Tokens, router: Router, around: Surroundings) -> list[fx.Node]:
    """Products that the result of a product enters next."""
    found: dict[fx.Node, None] = {}
    seen, queue = {first}, deque([first])
    while queue and len(seen) < _ROOM:
        node = queue.popleft()
        for user in node.users:
            products = around.products(user)
            if products and products[0][1].product is not first and products[0][1].node is not node:
                if products[0][1].x is node:
                    found.setdefault(products[0][1].product)
            elif user not in seen and user.op == "call_function" and not product_flops(user):
                seen.add(user)
                queue.append(user)
        if found:
            break
    return list(found)


def _stray(hidden: Hidden, tokens: Tokens, around: Surroundings) -> str | None:
    """Why the first products of an expert are none: what enters them is not what is routed."""
    for leaf in (hidden.up, hidden.gate):
        if leaf is not None:
            _, use = leaf.uses(around)[0]
            if use.x not in tokens.plain and use.x not in tokens.sent:
                return f"what enters '{leaf.uses(around)[0][0].name}' is not what the router sees"
    return None


def _roles(last: fx.Node, hidden: Hidden, around: Surroundings) -> list[tuple[tuple[Any, ...], dict[str, Piece]]] | str:
    """Linears by role, for each expert that a last product serves."""
    downs = {use.index: site for site, use in around.products(last)}
    gates = {use.index: site for site, use in hidden.gate.uses(around)} if hidden.gate is not None else {}
    ups = {use.index: site for site, use in hidden.up.uses(around)}
    if set(ups) != set(downs) or (gates and set(gates) != set(downs)):
        return f"{len(ups)} experts make hidden values, {len(downs)} take them"
    found = []
    for index, down in downs.items():
        if hidden.gate is not None and hidden.gate == hidden.up:
            roles = {"gate_up": Piece(ups[index]), "down": Piece(down)}
        else:
            roles = {"gate": Piece(gates[index], hidden.gate.part)} if hidden.gate is not None else {}
            roles |= {"up": Piece(ups[index], hidden.up.part), "down": Piece(down)}
        numbers = [int(n) for n in re.findall(r"\d+", down.name)]
        found.append(((numbers, around.position[last]) if index is None else ([index], 0), roles))
    return found


def _shared(
    router: Router, tokens: Tokens, around: Surroundings, taken: set[fx.Node]
) -> tuple[tuple[dict[str, Piece], ...], set[fx.Node]]:
    """Feed-forward blocks that all tokens enter, beside the experts."""
    found: dict[fx.Node, dict[str, Piece]] = {}
    nodes: set[fx.Node] = set()
    for first in _entered(tokens.plain, around):
        if first in taken or first is router.use.product:
            continue
        for last in _next(first, tokens, router, around):
            pairs = around.products(last)
            if last in found or last in taken or len(pairs) != 1:
                continue
            hidden = read_hidden(pairs[0][1].x, around)
            if isinstance(hidden, str) or _stray(hidden, tokens, around) is not None:
                continue
            roles = _roles(last, hidden, around)
            if not isinstance(roles, str) and pairs[0][0].out_features == router.site.in_features:
                found[last] = roles[0][1]
                nodes |= {*hidden.nodes, last, hidden.up.product}
    return tuple(found.values()), nodes


def _between(
    router: Router, tokens: Tokens, around: Surroundings, experts: set[fx.Node], shared: set[fx.Node]
) -> set[fx.Node]:
    """Values that send tokens to experts and put together what they give."""
    nodes = {*router.cone, *(n for n in tokens.sent)} - shared
    queue = deque(n for n in experts if around.products(n))
    seen: set[fx.Node] = set()
    while queue:  # from each last product to where its result meets the choice
        node = queue.popleft()
        for user in node.users:
            if user in experts or user in nodes or user in seen or user.op != "call_function" or around.products(user):
                continue
            if product_flops(user) and user.target not in _MATMULS:
                continue
            seen.add(user)
            if any(n in router.cone for n in user.all_input_nodes):
                nodes.add(user)
            elif user.target in _VIEWS and len(seen) < 4 * len(experts) + 16:
                nodes.add(user)
                queue.append(user)
    return nodes


def _dispatch(router: Router, tokens: Tokens, found: list[Any], around: Surroundings) -> str:
    """How tokens reach experts."""
    first = next(iter(found[0][1].values())).site.uses[0]
    if first.routing is not None:
        return "grouped_mm" if first.routing.kind == "grouped" else "bmm"
    if any(n.target in _MATMULS for n in tokens.sent):
        return "one_hot"
    if first.index is None:
        return "loop"
    return "einsum" if first.product.target is aten.einsum.default else "bmm"
