"""Attention in a graph: torch's own operation, or written out with a cap on the scores or with sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.onnx.evaluate import Unknown, evaluate
from recast.lowering.onnx.fuse import named
from recast.patterns.program import Program

__all__ = ["Product", "products_of"]

aten = torch.ops.aten
_COPIES = {aten.clone.default, aten.alias.default, aten.type_as.default, aten.to.dtype, aten._to_copy.default}
_CLOSE = 1e-5  # relative, for numbers of float32 on their way through a softmax


@dataclass(frozen=True)
class Product:
    """``softmax(cap * tanh(scale * query key' / cap) + mask)`` times the values, with one more score, the sink, in each row.

    Attributes
    ----------
    node
        The result, (batch, heads, sequence, features).
    query, key, value, mask
        What it is made of; `mask` is None where there is none.
    scale
        None for one over the root of the features.
    cap
        0 for none.
    sinks
        A score of each head, (heads,), whose weight goes to nothing.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float | None
    causal: bool = False
    dropout: float = 0.0
    shared: bool = False
    cap: float = 0.0
    sinks: fx.Node | None = None


def products_of(program: Program) -> list[Product]:
    """Every attention in a graph, in order."""
    found = []
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            given = named(node)
            query, key, value, mask, scale = (given[n] for n in ("query", "key", "value", "attn_mask", "scale"))
            causal, dropout, shared = (given[n] for n in ("is_causal", "dropout_p", "enable_gqa"))
            found.append(Product(node, query, key, value, mask, scale, causal, dropout, shared))
        elif node.target is aten.matmul.default:
            product = _written_out(node)
            if product is not None:
                found.append(product)
    return found


def _written_out(node: fx.Node) -> Product | None:
    """An attention that is written out, if its weights are what they are read as, on an example."""
    weights, value = node.args[:2]
    here = _past_copies(weights)
    ends = _is(here, aten.slice.Tensor) and tuple(here.args[1:]) in ((3, 0, -1), (-1, 0, -1))
    here = _past_copies(here.args[0]) if ends else here
    if not isinstance(value, fx.Node) or not _is(here, aten.softmax.int) or here.args[1] not in (-1, 3):
        return None
    here = _past_copies(here.args[0])
    if _is(here, aten.sub.Tensor) and _is_largest(here.args[1], here.args[0]):
        here = _past_copies(here.args[0])
    sinks = None
    if ends:
        if not _is(here, aten.cat.default) or here.args[1:] not in ((-1,), (3,)) or len(here.args[0]) != 2:
            return None
        here, sinks = (_past_copies(part) for part in here.args[0])
        while sinks.target in (aten.expand.default, aten.view.default, aten.reshape.default):
            sinks = _past_copies(sinks.args[0])
    mask = None
    if _is(here, aten.add.Tensor) and isinstance(here.args[1], fx.Node):
        here, mask = _past_copies(here.args[0]), here.args[1]
    factors: list[Any] = []
    scores = here
    while scores.target in (aten.mul.Tensor, aten.div.Tensor, aten.tanh.default):
        if scores.target is aten.tanh.default:
            factors.append("tanh")
        elif isinstance(scores.args[1], int | float):
            factor = float(scores.args[1])
            factors.append(factor if scores.target is aten.mul.Tensor else 1 / factor)
        else:
            return None
        scores = _past_copies(scores.args[0])
    if not _is(scores, aten.matmul.default) or not _is(scores.args[1], aten.transpose.int):
        return None
    query, turned = scores.args[:2]
    if sorted(d % 4 for d in turned.args[1:]) != [2, 3] or query.meta["val"].dim() != 4:
        return None
    read = _scale_and_cap(factors)
    if read is None:
        return None
    product = Product(node, query, turned.args[0], value, mask, read[0], cap=read[1], sinks=sinks)
    return product if _computes(product, weights, scores) else None


def _past_copies(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _COPIES:
        node = node.args[0]
    return node


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_largest(node: Any, of: Any) -> bool:
    """Whether a value is the largest of each row of another: taking it away leaves a softmax as it is."""
    if _is(node, aten.amax.default):
        return node.args[0] is of
    return (
        isinstance(node, fx.Node)
        and node.args[1:] == (0,)
        and _is(node.args[0], aten.max.dim)
        and node.args[0].args[0] is of  # type: ignore[union-attr]
    )


def _scale_and_cap(factors: list[Any]) -> tuple[float, float] | None:
    """What scores are multiplied with, and where they are capped, from factors before and after a tanh, the last first."""
    if "tanh" not in factors:
        return _together(factors), 0.0
    place = factors.index("tanh")
    if "tanh" in factors[place + 1 :]:
        return None
    cap = _together(factors[:place])
    return _together(factors[place + 1 :]) * cap, cap


def _together(factors: list[float]) -> float:
    product = 1.0
    for factor in factors:
        product *= factor
    return product


def _computes(product: Product, weights: Any, scores: fx.Node) -> bool:
    """Whether the weights are those of this attention, on an example: what was read of a graph is not relied on."""
    batch, heads, new, total = 2, int(scores.meta["val"].shape[1]), 3, 7
    generator = torch.Generator().manual_seed(0)
    example = 8 * torch.randn(batch, heads, new, total, generator=generator)
    given: dict[fx.Node, Tensor] = {scores: example}
    wanted = example.double() * (product.scale or 1.0)
    if product.cap:
        wanted = product.cap * torch.tanh(wanted / product.cap)
    if product.mask is not None:
        given[product.mask] = torch.randn(batch, 1, new, total, generator=generator)
        wanted = wanted + given[product.mask]
    if product.sinks is not None:
        if tuple(product.sinks.meta["val"].shape) != (heads,):
            return False
        given[product.sinks] = torch.randn(heads, generator=generator)
        wanted = torch.cat([wanted, given[product.sinks].double().view(1, -1, 1, 1).expand(batch, heads, new, 1)], -1)
    wanted = torch.softmax(wanted, -1)[..., :total]
    try:
        found = evaluate(weights, given, resized=(scores.meta["val"].shape, example.shape))
    except Unknown:
        return False
    if found.shape != wanted.shape:
        return False
    return bool(((found - wanted).abs() <= _CLOSE * wanted.abs() + 1e-9).all())
