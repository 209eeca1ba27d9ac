"""From a match to an `AttentionSite`: the linears that make queries, keys and values, the one after, and the kind of mask."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from recast.patterns.attention.masks import kind_of_kept
from recast.patterns.attention.spellings import NORMALISERS, SDPA
from recast.patterns.attention.steps import Steps, read_steps
from recast.patterns.language import COPIES, VIEWS, Match, among, literal
from recast.patterns.linear.packing import size_hint
from recast.patterns.provenance import Origin, follows, origins, piece_read
from recast.patterns.rules import Surroundings
from recast.patterns.sites import AttentionSite, NormSite, Piece, RotarySite, source_line

__all__ = ["build", "common_module", "made_by", "taken_by"]

aten = torch.ops.aten

_WRITES = {"cat", "index_copy", "index_put", "slice_scatter", "scatter", "where", "stack"}
_LAID_OUT = VIEWS | COPIES
_KEPT: WeakKeyDictionary[Surroundings, dict[Any, str | None]] = WeakKeyDictionary()


def build(match: Match, around: Surroundings) -> AttentionSite | str:
    """Make the site, or say why it is no attention."""
    product = match["product"]
    steps = read_steps(match, around.scope) if product.target not in SDPA else _of_operation(product, around)
    left, right, value = (match[n] for n in ("query", "key", "value"))
    swapped = product.target not in SDPA and _keys_left(match, steps)
    query, key = (right, left) if swapped else (left, right)
    if not all(isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor) for n in (query, key, value)):
        return "queries, keys and values are needed as tensors"
    if around.products(product):
        return "it multiplies matrices that are looked up in a weight (experts): no attention"
    found = [made_by(n, around) for n in (query, key, value)]
    notes = [f"{role}: {reason}" for role, (_, reason, _) in zip("qkv", found, strict=True) if reason]
    pieces = [piece for piece, _, _ in found]
    whole: list[Piece | None] = list(pieces)
    for i, (_, _, origin) in enumerate(found[:2]):
        # Latent attention joins heads from what turns with the position and what does not.
        joined = [] if origin is None else _joined_from(origin, around)
        if len({piece.site.name for piece in joined}) == 1:
            pieces[i] = whole[i] = Piece(joined[0].site)
        elif joined:
            whole[i] = None
            notes.append(f"{'qk'[i]}: heads are joined from {' and '.join(repr(piece.name) for piece in joined)}")
    taker = taken_by(product, around)
    if taker is None:
        notes.append("o: no linear takes the result")
    if taker is None and not any(pieces):
        return "no linear makes its queries, keys or values, and none takes its result"
    head_dim, value_dim = (size_hint(n.meta["val"].shape[-1]) for n in (left, value))
    if product.target not in SDPA and product.target is not aten.einsum.default and product.args[1] is not value:
        value_dim = size_hint(value.meta["val"].shape[-2])  # the values stand on the left, transposed
    if product.target not in SDPA and (summed := _depth_of_keys(match)) is not None:
        head_dim = summed
    heads = _heads(query, head_dim, whole[0])
    kv_heads = _kv_heads(whole[1], head_dim, heads)
    paths = {id(n): n for _, _, origin in found if origin is not None for n in [origin.use.node, *origin.path]}
    inner = _structures(list(paths.values()), around)
    name = common_module([p for p in (*pieces, taker) if p is not None], product)
    kind, mask = _mask(steps, product, around)
    if swapped:
        steps.give_up("the scores are keys times queries, transposed after")
    if steps.reason:
        notes.append(f"not raised: {steps.reason}")
    return AttentionSite(
        name=name,
        weights=tuple(dict.fromkeys(w for p in (*pieces, taker) if p is not None for w in p.weights)),
        node=product,
        nodes=match.nodes,
        pattern="attention" if product.target in SDPA else "attention_written_out",
        where=source_line(product),
        q=pieces[0],
        k=pieces[1],
        v=pieces[2],
        o=taker,
        query=query,
        key=key,
        value=value,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=steps.scale,
        mask=kind,
        mask_node=mask,
        masks=tuple(steps.masks),
        score_dtype=steps.dtype,
        grouped=bool(product.target in SDPA and around.scope.named(product).get("enable_gqa")),
        normaliser=_normaliser(match),
        softcap=steps.softcap,
        sinks=steps.sinks,
        rotary=tuple(s.name for s in inner if isinstance(s, RotarySite)),
        norms=tuple(s.name for s in inner if isinstance(s, NormSite)),
        cross=_cross(found[0][2], found[1][2]),
        cache=any(_joined(origin, around) for _, _, origin in found[1:]),
        notes=tuple(notes),
    )


def made_by(node: fx.Node, around: Surroundings) -> tuple[Piece | None, str, Origin | None]:
    """The linear that makes a value (the nearest one if several do), why there is none, and the way from it."""
    made = [o for o in origins(node, around) if min(o.site.shape) > 1]
    if not made:
        return None, "no linear makes it", None
    piece = piece_read(made[0])
    return piece, "", made[0]


def _joined_from(origin: Origin, around: Surroundings) -> list[Piece]:
    """Different linears, or parts of one, whose results are joined to heads on the way from a product; empty if there is one."""
    for node in reversed(origin.path):
        made = [made_by(part, around)[0] for part in _side_by_side(node, around)]
        pieces = list(dict.fromkeys(piece for piece in made if piece is not None))
        if len(pieces) > 1:
            return pieces
    return []


def _side_by_side(node: fx.Node, around: Surroundings) -> list[fx.Node]:
    """Values that stand beside each other in the last dimension of one: of `cat`, or written into an empty one in turn."""
    found: list[fx.Node] = []
    last = node.meta["val"].dim() - 1 if isinstance(node.meta.get("val"), Tensor) else -1
    if node.target is aten.cat.default:
        return node.all_input_nodes if around.scope.named(node).get("dim", 0) in (-1, last) else []
    while node.target is aten.slice_scatter.default and around.scope.named(node).get("dim", 0) in (-1, last):
        base, written = node.all_input_nodes[:2]
        found.append(written.all_input_nodes[1] if written.target is aten.copy.default else written)
        node = base
    empty = str(getattr(node.target, "_opname", "")).startswith("new_")
    return found if empty or not found else [*found, node]


def taken_by(product: fx.Node, around: Surroundings) -> Piece | None:
    """The linear that takes a result."""
    taken = [site for site, _ in follows(product, around) if min(site.shape) > 1]
    return Piece(taken[0]) if taken else None


def _of_operation(product: fx.Node, around: Surroundings) -> Steps:
    named = around.scope.named(product)
    scale = named.get("scale")
    depth = size_hint(product.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    number = literal(scale, around.scope) if scale is not None else None
    steps = Steps(scale=float(number) if isinstance(number, int | float) else 1 / math.sqrt(depth))
    mask = named.get("attn_mask")
    if isinstance(mask, fx.Node):
        boolean = mask.meta["val"].dtype == torch.bool
        steps.masks.append(("keep" if boolean else "add", mask, None))
    if named.get("dropout_p"):
        steps.reason = "it drops some of its weights at random"
    if named.get("is_causal"):
        steps.masks.append(("causal", None, None))
    return steps


def _keys_left(match: Match, steps: Steps) -> bool:
    """Whether the normaliser runs along what the left operand of the scores' product brings: that one holds the keys."""
    scores = match["scores"]
    if scores.target is not aten.einsum.default:
        return steps.keys == -2
    terms, _, result = str(scores.args[0]).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    if not steps.keys or -steps.keys > len(result) or "." in result[steps.keys :]:
        return False
    letter = result[steps.keys]
    return letter in first and letter not in second


def _depth_of_keys(match: Match) -> int | None:
    """Size summed over in the product of queries with keys, which for `einsum` need not be the last."""
    scores = match["scores"]
    if scores.target is not aten.einsum.default:
        return None
    letters = str(scores.args[0]).replace(" ", "")
    terms, _, result = letters.partition("->")
    first, _, second = terms.partition(",")
    summed = [d for d in first if d in second and d not in result]
    shape = match["query"].meta["val"].shape
    return math.prod(size_hint(shape[first.index(d) - len(first)]) for d in summed) if summed else None


def _heads(query: fx.Node, head_dim: int, piece: Piece | None) -> int:
    shape = [size_hint(s) for s in query.meta["val"].shape]
    if piece is not None and head_dim and piece.shape[0] % head_dim == 0:
        rows = piece.shape[0] // head_dim
        grouped = [
            a * b for a, b in itertools.pairwise(shape[1:-1])
        ]  # heads of keys, and queries for each, side by side
        if len(shape) < 4 or rows in shape or rows in grouped[:1] or shape[1] % max(rows, 1) == 0:
            return rows
    return shape[-3] if len(shape) >= 4 else 1


def _kv_heads(piece: Piece | None, head_dim: int, heads: int) -> int:
    if piece is not None and head_dim and piece.shape[0] % head_dim == 0:
        rows = piece.shape[0] // head_dim
        if rows and rows <= heads and heads % rows == 0:
            return rows
    return heads


def _structures(path: Sequence[fx.Node], around: Surroundings) -> list[Any]:
    return [s for node in path for s in around.structures.get(node, ())]


def common_module(pieces: Sequence[Piece], product: fx.Node) -> str:
    """What the linears' names have in common, their module."""
    names = [p.site.name.split(".") for p in pieces]
    common: list[str] = []
    for parts in zip(*(n[:-1] for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or product.name


def _normaliser(match: Match) -> str:
    node = match.get("normaliser")
    target = str(getattr(node.target, "_opname", "softmax")) if isinstance(node, fx.Node) else "softmax"
    return target if node is not None and node.target in NORMALISERS and target in ("sigmoid", "relu") else "softmax"


def _mask(steps: Steps, product: fx.Node, around: Surroundings) -> tuple[str, fx.Node | None]:
    if not steps.masks:
        return ("unknown" if steps.unread else "none"), None
    kinds = [kind for kind, _, _ in steps.masks]
    node = next((m for _, m, _ in steps.masks if isinstance(m, fx.Node)), None)
    if node is None:
        return "causal", None
    if any(kind == "add" and isinstance(m, fx.Node) and _learned(m, around) for kind, m, _ in steps.masks):
        return "bias", node
    masks = tuple(steps.masks)
    asked = ("kept", *((kind, mask) for kind, mask, _ in masks))
    if asked not in _KEPT.setdefault(around, {}):
        _KEPT[around][asked] = kind_of_kept(masks, around)  # layers share their mask
    found = None if steps.unread else _KEPT[around][asked]
    return found or ("additive" if kinds[0] == "add" else "boolean"), node


def _learned(mask: fx.Node, around: Surroundings) -> bool:
    """Whether what is added is made of weights: a position bias."""
    return any(n in around.scope.constants and around.scope.constants.sources[n] and
               any(around.scope.constants.weights[w].is_floating_point() and around.scope.constants.weights[w].ndim > 1
                   for w in around.scope.constants.sources[n])
               for n in [mask, *_above(mask, 40)])  # fmt: skip


def _above(node: fx.Node, limit: int) -> list[fx.Node]:
    seen, queue = {node: None}, deque([node])
    while queue and len(seen) < limit:
        for operand in queue.popleft().all_input_nodes:
            if operand not in seen:
                seen[operand] = None
                queue.append(operand)
    return list(seen)


def _cross(first: Origin | None, second: Origin | None) -> bool:
    """Whether keys are made from another sequence than queries: from a value of another length, or another input."""
    if first is None or second is None:
        return False
    a, b = (_plain(o.use.x) for o in (first, second))
    if a is b:
        return False
    tokens = [n.meta["val"].shape[:-1] for n in (a, b)]
    return [str(s) for s in tokens[0]] != [str(s) for s in tokens[1]]


def _plain(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and among(node, _LAID_OUT):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _joined(origin: Origin | None, around: Surroundings) -> bool:
    """Whether a path joins what a linear made with something that came from outside: an input, or a buffer that is written."""
    if origin is None:
        return False
    for node in origin.path:
        if str(getattr(node.target, "_opname", "")) not in _WRITES:
            continue
        for operand in node.all_input_nodes:
            base = _plain(operand)
            if base.op == "placeholder" or (base.op == "get_attr" and base not in around.scope.constants):
                return True
    return False
