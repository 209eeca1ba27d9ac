"""Where exact rewrites ask for norms and attention: the one place that knows how either is spelled in the graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.exact import Edit
from recast.passes.follow import is_cast
from recast.patterns.attention.dialect import attention
from recast.patterns.norm import dialect as norms
from recast.patterns.program import fixed_size

__all__ = ["Affine", "Core", "LayerNorm", "affine_of", "arguments", "cores", "is_norm", "layer_norm_of", "number_of"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_NORMS = (norms.layer_norm, norms.rms_norm, norms.l2_norm)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operation by their names, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([a.name for a in schema], node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


@dataclasses.dataclass(frozen=True)
class Affine:
    """A value that is ``bare * weight + bias`` with vectors along its last dimension.

    Parameters
    ----------
    node
        The value.
    weight, bias
        Constants, or None.
    kind
        ``layer_norm``, ``rms_norm``, ``raised`` (a norm of the dialect), ``scale`` or ``shift``.
    x
        What is normalised, scaled or shifted.
    eps
        Of a norm.
    offset
        Added to the weight.
    """

    node: fx.Node
    kind: str
    x: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    eps: float | None = None
    offset: float = 0.0

    def bare(self, graph: fx.Graph) -> fx.Node:
        """Insert the value without weight and bias."""
        size = self.node.meta["val"].shape[-1]
        if self.kind == "layer_norm":
            return graph.call_function(aten.layer_norm.default, (self.x, [size], None, None, self.eps))
        if self.kind == "rms_norm":
            return graph.call_function(aten.rms_norm.default, (self.x, [size], None, self.eps))
        if self.kind == "raised":
            options = {k: v for k, v in self.node.kwargs.items() if k not in ("offset", "weight", "bias")}
            return graph.call_function(self.node.target, (self.x, None, None), options)  # type: ignore[arg-type]
        return self.x


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """A layer norm over the last dimension, as ATen or as the dialect has it."""

    node: fx.Node
    x: fx.Node
    size: int
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float

    def as_rms_norm(self, graph: fx.Graph) -> fx.Node:
        """Insert the same norm without subtracting the mean."""
        if self.node.target is norms.layer_norm:
            options = {k: v for k, v in self.node.kwargs.items() if k not in ("axes", "weight", "bias")}
            return graph.call_function(norms.rms_norm, (self.x, self.weight, self.bias), options)
        new = graph.call_function(aten.rms_norm.default, (self.x, [self.size], self.weight, self.eps))
        return new if self.bias is None else graph.call_function(aten.add.Tensor, (new, self.bias))


def layer_norm_of(node: fx.Node) -> LayerNorm | str | None:
    """Read a node as a layer norm; say why it is one of another kind, or None if it is none."""
    if node.target is aten.layer_norm.default:
        given = arguments(node)
        sizes = given["normalized_shape"]
        if len(sizes) == 1:
            return LayerNorm(node, given["input"], int(sizes[0]), given["weight"], given["bias"], given["eps"])
        return "it normalises over several dimensions"
    if node.target is norms.layer_norm:
        x, weight, bias = _operands(node)
        size = fixed_size(node.meta["val"].shape[-1])
        if node.kwargs.get("axes", 1) != 1 or size is None:
            return "it normalises over several dimensions"
        return LayerNorm(node, x, size, weight, bias, float(node.kwargs["eps"]))  # type: ignore[arg-type]
    return None


def is_norm(node: fx.Node) -> bool:
    """Whether a value is the result of a norm over features."""
    return node.target in (aten.layer_norm.default, aten.rms_norm.default, *_NORMS)


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """What is normalised, weight and bias of a norm of the dialect."""
    given = dict(zip(("x", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return given["x"], given.get("weight"), given.get("bias")


def affine_of(node: fx.Node, edit: Edit) -> Affine | None:
    """Read a node as a norm with scale or bias, or as a value scaled or shifted by a constant vector."""
    if node.op != "call_function" or node in edit.constants:
        return None
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        given = arguments(node)
        if len(given["normalized_shape"]) != 1:
            return None
        kind = "layer_norm" if node.target is aten.layer_norm.default else "rms_norm"
        return Affine(node, kind, given["input"], given["weight"], given.get("bias"), given["eps"])
    if node.target in _NORMS:
        x, weight, bias = _operands(node)
        size = fixed_size(node.meta["val"].shape[-1])
        if (
            any(v is not None and (size is None or _vector(v) != size) for v in (weight, bias))
            or node.kwargs.get("axes", 1) != 1
        ):
            return None
        return Affine(node, "raised", x, weight, bias, offset=float(node.kwargs.get("offset", 0.0)))  # type: ignore[arg-type]
    if node.target not in (aten.mul.Tensor, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    x, vector = (right, left) if left in edit.constants else (left, right)
    if vector not in edit.constants or x in edit.constants:
        return None
    size = _vector(vector)
    value, source = node.meta["val"], x.meta.get("val")
    if source is None:  # made by the edit at work; the next call sees what it is
        return None
    if size is None or size < 2 or fixed_size(source.shape[-1]) != size or value.dtype != source.dtype:
        return None
    if value.ndim != source.ndim or not value.is_floating_point():
        return None
    if node.target is aten.mul.Tensor:
        return Affine(node, "scale", x, weight=vector)
    return Affine(node, "shift", x, bias=vector)


def _vector(node: fx.Node) -> int | None:
    """Size of a constant that is a vector along the last dimension."""
    shape = [fixed_size(s) for s in node.meta["val"].shape]
    return shape[-1] if shape and all(s == 1 for s in shape[:-1]) else None


def number_of(node: fx.Node) -> float | None:
    """The number that a multiplication or division by one multiplies with; None for other operations."""
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) or node.kwargs:
        return None
    number = node.args[1]
    if isinstance(number, bool) or not isinstance(number, int | float) or not number:
        return None
    return float(number) if "mul" in str(node.target) else 1.0 / number


@dataclasses.dataclass(frozen=True)
class Core:
    """The inner part of an attention: ``softmax(scale q k^T + mask) v``.

    Parameters
    ----------
    node
        The result, (..., tokens, features).
    key, value
        What is read as keys and values, ``value`` as (..., tokens, features).
    key_reader
        The operation that multiplies queries with keys.
    key_axis
        Which axis of `key` runs over tokens, counted from the end.
    groups
        Query heads for each head of keys and values.
    zero_rows
        Why a query may get zero instead of a mean of values; empty if none can.
    """

    node: fx.Node
    key: fx.Node
    value: fx.Node
    key_reader: fx.Node
    key_axis: int
    groups: int = 1
    zero_rows: str = ""


def cores(edit: Edit) -> list[Core]:
    """Every attention of a program that normalises by softmax over the keys, and by nothing else."""
    found = []
    for node in edit.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is SDPA:
            found += _fused(node)
        elif node.target is attention:
            found += _raised(node)
        elif node.target in (aten.softmax.int, aten._softmax.default):
            found += _written_out(node)
    return found


def _fused(node: fx.Node) -> list[Core]:
    given = arguments(node)
    if given["dropout_p"]:
        return []
    heads = [
        fixed_size(given[n].meta["val"].shape[-3]) if given[n].meta["val"].ndim > 2 else 1 for n in ("query", "key")
    ]
    if given["enable_gqa"] and (None in heads):
        return []
    groups = heads[0] // heads[1] if given["enable_gqa"] else 1  # type: ignore[operator]
    mask = given["attn_mask"]
    why = "" if mask is None else _zero_rows(mask)
    return [Core(node, given["key"], given["value"], node, -2, groups, why)]


def _raised(node: fx.Node) -> list[Core]:
    names = ("query", "key", "value", "masks", "sinks")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    fills = [
        f for kind, f in zip(given.get("kinds", ()), given.get("fills", ()), strict=False) if kind in ("keep", "drop")
    ]
    if given.get("sinks") is not None or given.get("softcap") or given.get("normaliser", "softmax") != "softmax":
        return []
    if not given.get("fused"):
        return [Core(node, given["key"], given["value"], node, -1)] if all(f <= -1e4 for f in fills) else []
    groups = 1
    if given.get("grouped"):
        heads = [fixed_size(given[n].meta["val"].shape[-3]) for n in ("query", "key")]
        if heads[0] is None or not heads[1]:
            return []
        groups = heads[0] // heads[1]
    masks = given.get("masks", ())
    return [Core(node, given["key"], given["value"], node, -2, groups, _zero_rows(masks[0]) if masks else "")]


def _zero_rows(mask: fx.Node) -> str:
    return f"a query that the mask '{mask.name}' keeps from all keys gets zero, not a mean of values"


_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def _written_out(softmax: fx.Node) -> list[Core]:
    scores = softmax.args[0]
    rank = softmax.meta["val"].ndim
    if not isinstance(scores, fx.Node) or int(softmax.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        return []
    reader: fx.Node = softmax
    while scores.target not in _PRODUCTS:
        if len(scores.users) != 1 or scores.op != "call_function":
            return []
        following = _towards_product(scores)
        if following is None:
            return []
        reader, scores = scores, following
    if len(scores.users) != 1:
        return []
    weighted: fx.Node = softmax
    while True:
        users = [u for u in weighted.users if u.op == "call_function"]
        casts = [u for u in users if is_cast(u) or u.target is aten.expand.default]
        products = [u for u in users if u.target in _PRODUCTS and u.args[0] is weighted]
        if len(products) == 1:
            break
        if len(casts) != 1:
            return []
        weighted = casts[0]
    (product,) = products
    key, value = scores.args[1], product.args[1]
    if not isinstance(key, fx.Node) or not isinstance(value, fx.Node) or reader is None:
        return []
    return [Core(product, key, value, scores, -1)]


def _towards_product(node: fx.Node) -> fx.Node | None:
    """One step from what enters softmax back to the scores, over what adding a number to a row of scores commutes with."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if is_cast(node) or number_of(node) is not None or node.target in _RESHAPES:
        return first if node.target not in _RESHAPES or _same_last(node, first) else None
    if node.target is aten.add.Tensor and not node.kwargs and isinstance(node.args[1], fx.Node):
        sides = [n for n in (first, node.args[1]) if _leads_to_product(n)]
        return sides[0] if len(sides) == 1 else None
    if node.target is aten.masked_fill.Scalar and float(node.args[2]) <= -1e4:  # type: ignore[arg-type]
        return first
    return None


_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _same_last(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"].shape[-1], source.meta["val"].shape[-1]
    return str(a) == str(b)


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if node.target in _PRODUCTS:
            left, right = node.args[:2]
            return all(isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor) for n in (left, right))
        following = _towards_product(node) if node.op == "call_function" else None
        if following is None:
            return False
        node = following
    return False
