"""How attention is written: one operation, or a product, steps on the scores, a normaliser and another product.

``normalise(steps(query @ keyᵀ)) @ value``. The steps may come in any order and number: scales, masks added on either side or
filled in, soft caps, relative biases, sinks joined as one more column, casts and views in between.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.language import (
    CASTS,
    COPIES,
    VIEWS,
    Any_,
    Call,
    Either,
    Literal,
    Pair,
    Pattern,
    Repeat,
    Scope,
    Through,
)

__all__ = [
    "ELEMENTWISE",
    "EXPONENTIALS",
    "NORMALISERS",
    "PRODUCTS",
    "SDPA",
    "SOFTMAX",
    "fused",
    "reduces_last",
    "written_out",
]

aten = torch.ops.aten

SDPA = frozenset(
    {
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_attention_math.default,
    }
)
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
NORMALISERS = SOFTMAX | {aten.sigmoid.default, aten.relu.default}
_LOG_SOFTMAX = frozenset({aten.log_softmax.int, aten._log_softmax.default})
EXPONENTIALS = _LOG_SOFTMAX | {aten.exp.default}
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default})

_SHAPES = VIEWS | CASTS | COPIES
_MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar})
_ADD = frozenset({aten.add.Tensor, aten.add.Scalar})
_SUBTRACT = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_BOUND = frozenset(
    {
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.maximum.default,
        aten.max.other,
        aten.nan_to_num.default,
    }
)
_TAKE = frozenset({aten.slice.Tensor, aten.narrow.default})
_DROPOUT = frozenset({aten.dropout.default, aten.native_dropout.default})
ELEMENTWISE = _MULTIPLY | _DIVIDE | _ADD | _SUBTRACT | _FILL | _WHERE | _BOUND | {aten.tanh.default}


def _computed(node: Any, scope: Scope) -> bool:
    return isinstance(node, fx.Node) and node not in scope.constants


def _both_computed(node: fx.Node, scope: Scope) -> bool:
    """Whether a product is one of activations."""
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return len([n for n in operands if n not in scope.constants]) > 1


def _einsum(first: Pattern, second: Pattern, name: str) -> Pattern:
    return Call.of(aten.einsum.default, Any_(), Pair(first, second), name=name, where=_both_computed)


def _score_step(inner: Pattern) -> Pattern:
    """One step between the product of queries with keys and the normaliser."""
    anything, number = Any_(), Literal()
    return Either.of(
        Call.of(_SHAPES, inner),
        Call.of(_MULTIPLY, inner, number, commutes=True),
        Call.of(_DIVIDE, inner, number),
        Call.of(_FILL, inner, anything),
        Call.of(_WHERE, anything, inner, anything),
        Call.of(_WHERE, anything, anything, inner),
        Call.of(_ADD, inner, anything, commutes=True),
        Call.of(_BOUND, inner, commutes=True),
        Call.of(aten.tanh.default, inner),
        # the largest score taken off, which changes nothing
        Call.of(_SUBTRACT, inner, anything),
        Call.of(aten.cat.default, Pair(inner, Any_("sinks")), where=_last_dimension),
        Call.of(_TAKE, inner),
        Call.of(_MULTIPLY, inner, anything, commutes=True),
        Call.of(operator.getitem, inner),
        Call.of(_DROPOUT, inner),
    )


def _last_dimension(node: fx.Node, scope: Scope) -> bool:
    dimension = scope.arguments(node)[1]
    return dimension in (-1, node.meta["val"].ndim - 1)


def _weight_step(inner: Pattern) -> Pattern:
    """One step between the normaliser and the product with the values."""
    anything = Any_()
    return Either.of(
        Call.of(_SHAPES, inner),
        Call.of(_TAKE, inner),
        Call.of(_FILL, inner, anything),
        Call.of(_WHERE, anything, inner, anything),
        Call.of(_WHERE, anything, anything, inner),
        Call.of(_DROPOUT, inner),
        Call.of(_BOUND, inner),
        Call.of(operator.getitem, inner),
        Call.of(_MULTIPLY, inner, anything, commutes=True),
        Call.of(_DIVIDE, inner, anything),
        # differential attention: two maps, the second taken off
        Call.of(_SUBTRACT, inner, anything),
    )


def _scores() -> Pattern:
    q, k = Any_("query", _computed), Any_("key", _computed)
    product = Either.of(
        Call.of({aten.matmul.default, aten.bmm.default}, q, k, name="scores", where=_both_computed),
        Call.of(aten.baddbmm.default, Any_("added"), q, k, name="scores", where=_both_computed),
        _einsum(q, k, "scores"),
    )
    return Repeat(_score_step, product, limit=14)


def reduces_last(node: fx.Node, scope: Scope) -> bool:
    """Whether a normaliser runs along keys, the last dimension."""
    if node.target not in SOFTMAX | _LOG_SOFTMAX:
        return True
    return scope.arguments(node)[1] in (-1, node.meta["val"].ndim - 1)


def _sums_last(node: fx.Node, scope: Scope) -> bool:
    named, last = scope.named(node), node.meta["val"].ndim - 1
    dimensions = named["dim"]
    return bool(named["keepdim"]) and named["dtype"] is None and isinstance(dimensions, list | tuple) and (
        [d % (last + 1) for d in dimensions] == [last]
    )  # fmt: skip


def _softmax_written_out() -> Pattern:
    """``e / sum(e)`` with ``e = exp(scores)``, whether or not the largest is taken off before, and ``exp(log_softmax(scores))``."""
    exponential = Call.of(aten.exp.default, _scores(), name="exponential")
    total = Call.of(aten.sum.dim_IntList, Any_("exponential"), where=_sums_last)
    logarithm = Call.of(_LOG_SOFTMAX, _scores(), name="exponential", where=reduces_last)
    return Either.of(
        Call.of(aten.div.Tensor, exponential, total, name="normaliser"),
        Call.of(aten.exp.default, logarithm, name="normaliser"),
    )


def written_out() -> Pattern:
    """Attention spelled as operations of its own."""
    normalised = Either.of(
        Call.of(NORMALISERS, _scores(), name="normaliser", where=reduces_last), _softmax_written_out()
    )
    weights = Repeat(_weight_step, normalised, limit=8)
    values = Any_("value", _computed)
    return Either.of(
        Call.of({aten.matmul.default, aten.bmm.default}, weights, values, name="product", where=_both_computed),
        Call.of(aten.matmul.default, values, Through(weights, VIEWS), name="product", where=_both_computed),
        _einsum(weights, values, "product"),
        _einsum(values, weights, "product"),
    )


def fused() -> Pattern:
    """Attention as one operation."""
    return Call.of(SDPA, Any_("query"), Any_("key"), Any_("value"), name="product")
