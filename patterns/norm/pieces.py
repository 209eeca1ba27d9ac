"""Pieces that written-out normalisations share: sums of squares, inverse roots, and the weight and bias that follow.

The names they bind: ``x`` (what is normalised), ``square``, ``sum`` or ``mean`` with ``..._dims`` (and ``..._count`` or
``..._share`` where the mean is a sum that is divided or multiplied), ``eps`` and one of ``inside``, ``bounded``, ``outside``,
``floor``, ``normal`` (x times the inverse root), ``weight``, ``bias``, ``scaled``, ``biased``, and ``weighted`` where the weight
meets x or the inverse root before these two meet.
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
    Call,
    Either,
    Literal,
    Pair,
    Pattern,
    Scope,
    Through,
    Weight,
    among,
)
from recast.patterns.rules import Surroundings

__all__ = [
    "ADD",
    "ANCHORS",
    "DIV",
    "MUL",
    "NORMS",
    "SUB",
    "affine",
    "cast",
    "computed",
    "has_constant",
    "mean",
    "mean_square",
    "normalised",
    "roots",
    "spread",
    "square",
    "sum_square",
    "suspicious",
    "total",
]

aten = torch.ops.aten

MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)
_AS_IT_IS = CASTS | COPIES
_PRODUCTS = frozenset({*MUL, *DIV})
ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
POW = (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
NORMS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
_BROADCAST = CASTS | COPIES | {aten.expand.default, aten.unsqueeze.default}
# What a root of something can end with, and what may stand between it and the product: for telling quickly that it is none.
_ROOTS = frozenset({aten.rsqrt.default, aten.sqrt.default, *POW, *NORMS, aten.std.correction, aten.std.dim})
_BETWEEN = _BROADCAST | frozenset(
    {*MUL, *DIV, *ADD, aten.reciprocal.default, aten.clamp_min.default, aten.clamp.default, aten.maximum.default}
)
_LAST = frozenset({*MUL, *DIV, *ADD})
_VAR_MEAN = (aten.var_mean.correction, aten.var_mean.dim)
_SUMS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.var.correction,
        aten.var.dim,
        aten.linalg_vecdot.default,
        *_VAR_MEAN,
        *NORMS,
    }
)
_DOTS = frozenset({aten.einsum.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.dot.default})
_ARRANGED = VIEWS | CASTS | COPIES


def cast(inner: Pattern) -> Pattern:
    """Seen through casts and copies."""
    return Through(inner, _AS_IT_IS)


def spread(inner: Pattern) -> Pattern:
    """Seen through casts and what adds or repeats dimensions: a statistic on its way to the values it is of."""
    return Through(inner, _BROADCAST)


def square(of: Pattern, name: str = "square") -> Pattern:
    """``of * of``, as a product or a power."""
    return Either.of(
        Call.of(POW, of, Literal(value=2), name=name),
        Call.of(MUL, of, of, name=name),
        Call.of(aten.square.default, of, name=name),
    )


def total(of: Pattern, name: str = "sum") -> Pattern:
    """A sum over some dimensions, bound to ``<name>_dims``."""
    return Call.of(aten.sum.dim_IntList, of, Literal(f"{name}_dims"), name=name)


def mean(of: Pattern, name: str = "mean") -> Pattern:
    """A mean over some dimensions, as one operation or as a sum that is divided."""
    return Either.of(
        Call.of(aten.mean.dim, of, Literal(f"{name}_dims"), name=name),
        Call.of(DIV, cast(total(of, name)), Literal(f"{name}_count", where=_is_number)),
        Call.of(MUL, cast(total(of, name)), Literal(f"{name}_share", where=_is_number), commutes=True),
    )


def mean_square(of: Pattern) -> Pattern:
    """The mean of the squares, also as the product of a value with itself."""
    dot = cast(_dot(of))
    return Either.of(
        mean(cast(square(of))),
        Call.of(DIV, dot, Literal("dot_count", where=_is_number)),
        Call.of(MUL, dot, Literal("dot_share", where=_is_number), commutes=True),
    )


def sum_square(of: Pattern) -> Pattern:
    """The sum of the squares."""
    return Either.of(total(cast(square(of))), _dot(of))


def _dot(of: Pattern) -> Pattern:
    """The sum of the squares along the last dimension, as one operation."""
    return Either.of(
        Call.of(aten.einsum.default, Literal(where=_over_last), Pair(of, of), name="dot"),
        Call.of(aten.linalg_vecdot.default, of, of, name="dot", where=_vectors_last),
    )


def _over_last(equation: Any) -> bool:
    """Whether an equation multiplies a value with itself and sums its last dimension: ``btd,btd->bt``."""
    if not isinstance(equation, str) or equation.count(",") != 1:
        return False
    terms, arrow, result = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    letters = first.replace("...", "")
    return bool(arrow) and first == second and len(set(letters)) == len(letters) > 0 and result == first[:-1]


def _vectors_last(node: fx.Node, scope: Scope) -> bool:
    return scope.named(node).get("dim", -1) in (-1, node.args[0].meta["val"].ndim - 1)  # type: ignore[union-attr]


def _padded(of: Pattern) -> Pattern:
    """A square with something small added, or bounded from below, or as it is."""
    eps = Literal("eps", where=_is_number)
    return Either.of(
        Call.of(ADD, spread(of), eps, commutes=True, name="inside"),
        Call.of([aten.clamp_min.default, aten.clamp.default], spread(of), eps, name="bounded", where=_only_from_below),
        of,
    )


def roots(of: Pattern, root_itself: Pattern | None = None) -> tuple[Pattern, Pattern]:
    """What x is multiplied by, and what it is divided by, if `of` is the mean or sum of squares; `root_itself` is a root ready made."""
    padded = spread(_padded(of))
    plain = Either.of(
        Call.of(aten.sqrt.default, padded),
        Call.of(POW, padded, Literal(value=0.5)),
        *([] if root_itself is None else [root_itself]),
    )
    eps = Literal("eps", where=_is_number)
    least = [aten.clamp_min.default, aten.clamp.default, aten.maximum.default]
    divisor = Either.of(
        plain,
        Call.of(ADD, spread(plain), eps, commutes=True, name="outside"),
        Call.of(least, spread(plain), eps, name="floor", where=_only_from_below),
    )
    inverse = Call.of(aten.reciprocal.default, spread(divisor))
    factor = Either.of(
        Call.of(aten.rsqrt.default, padded),
        Call.of(POW, padded, Literal(value=-0.5)),
        inverse,
        Call.of(MUL, inverse, Literal(value=1), commutes=True),
    )
    return factor, divisor


def normalised(x: Pattern, of: Pattern, root_itself: Pattern | None = None) -> Pattern:
    """``x * factor`` or ``x / divisor``, where the weight may stand at either; the node is ``normal``."""
    factor, divisor = (spread(root) for root in roots(of, root_itself))
    weight = Weight("weight")
    weighted = cast(Call.of(MUL, weight, x, commutes=True, name="weighted", where=has_constant))
    scale = Either.of(
        Call.of(MUL, weight, factor, commutes=True, name="weighted", where=has_constant),
        Call.of(DIV, weight, divisor, name="weighted", where=has_constant),
    )
    return Either.of(
        Call.of(MUL, factor, x, commutes=True, name="normal", where=_has_root),
        Call.of(DIV, x, divisor, name="normal", where=_has_root),
        Call.of(MUL, factor, weighted, commutes=True, name="normal", where=_weighted_before),
        Call.of(DIV, weighted, divisor, name="normal", where=_weighted_before),
        Call.of(MUL, cast(scale), x, commutes=True, name="normal", where=_weighted_before),
    )


_SPREADS = frozenset({aten.var.correction, aten.var.dim, *_VAR_MEAN, aten.std.correction, aten.std.dim})
ANCHORS = frozenset({aten.rsqrt.default, aten.sqrt.default, *POW, *NORMS, *_SPREADS})


def suspicious(node: fx.Node, around: Surroundings) -> bool:
    """Whether a root is taken of something that is summed: a scale or a distance is no norm that was missed."""
    if node.target in POW and not (isinstance(node.args[1], float) and abs(node.args[1]) == 0.5):
        return False
    if node.target not in (aten.rsqrt.default, aten.sqrt.default, *POW):
        return True
    inner = node.args[0]
    for _ in range(6):
        if not isinstance(inner, fx.Node) or inner.op != "call_function":
            return False
        if inner.target in _SUMS or (inner.target in _DOTS and _with_itself(inner)):
            return True
        if inner.target not in _BETWEEN | _ARRANGED and inner.target is not operator.getitem:
            return False
        inner = inner.all_input_nodes[0] if inner.all_input_nodes else None
    return False


def _with_itself(product: fx.Node) -> bool:
    """Whether a product is that of one value with itself, however arranged."""
    operands: Any = product.args[1] if product.target is aten.einsum.default else product.args[:2]
    sources = set()
    for operand in operands:
        while isinstance(operand, fx.Node) and operand.op == "call_function" and operand.target in _ARRANGED:
            operand = operand.args[0]
        sources.add(operand)
    return len(operands) == 2 and len(sources) == 1


def affine(normal: Pattern) -> Pattern:
    """What may follow: a weight, a bias, a cast back to the dtype of x."""
    seen = Through(normal, VIEWS | CASTS | COPIES)
    scaled = Call.of(MUL, Weight("weight"), seen, commutes=True, name="scaled", where=has_constant)
    biased = Call.of(
        ADD, Weight("bias"), cast(Either.of(scaled, normal)), commutes=True, name="biased", where=has_constant
    )
    return Either.of(
        Call.of(list(CASTS), Either.of(biased, scaled, normal), where=_rounds),
        biased,
        scaled,
        normal,
    )


def computed(value: Any, scope: Scope) -> bool:
    """Whether an operand is a tensor of floating point numbers that depends on inputs."""
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(held, Tensor) and held.is_floating_point() and value not in scope.constants


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _only_from_below(node: fx.Node, scope: Scope) -> bool:
    """Whether a bound is the least that a value may be, and not the most too."""
    return node.target is not aten.clamp.default or scope.named(node)["max"] is None


def _has_root(node: fx.Node, scope: Scope) -> bool:
    """Whether an operand comes from a root: most products do not, and need no closer look."""
    found = scope.answers.get(("has a root", node))
    if found is None:
        found = any(_leads_to_root(a, scope) for a in node.args[:2] if isinstance(a, fx.Node))
        scope.answers["has a root", node] = found
    return found


def _weighted_before(node: fx.Node, scope: Scope) -> bool:
    """Whether, besides, an operand is itself a product with a constant: a weight that stands at x or at the root."""
    if not _has_root(node, scope):
        return False
    for operand in node.args[:2]:
        at = operand
        while isinstance(at, fx.Node) and among(at, _AS_IT_IS):
            at = at.args[0]
        if isinstance(at, fx.Node) and among(at, _PRODUCTS) and has_constant(at, scope):
            return True
    return False


def _leads_to_root(node: fx.Node, scope: Scope) -> bool:
    for _ in range(8):
        if node.op != "call_function" or among(node, _ROOTS):
            return node.op == "call_function"
        operands = [n for n in node.all_input_nodes if n not in scope.constants] if among(node, _BETWEEN) else ()
        if not operands:
            return False
        node = operands[0]
    return False


def has_constant(node: fx.Node, scope: Scope) -> bool:
    """Whether an operand is a constant: most sums and products have none, and need no closer look."""
    return any(isinstance(a, fx.Node) and a in scope.constants for a in node.args[:2])


def _rounds(node: fx.Node, scope: Scope) -> bool:
    """Whether a cast narrows what nothing else reads: the end of a norm computed in a wider dtype."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in _LAST or len(source.users) != 1:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.is_floating_point()
        and after.is_floating_point()
        and torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits
    )
