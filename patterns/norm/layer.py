"""LayerNorm written out: ``(x - mean) / sqrt(var + eps)``, then maybe a weight and a bias, or with all of them folded."""

from __future__ import annotations

import operator

import torch

from recast.patterns.language import Any_, Call, Either, Literal, Match, Pattern, Weight
from recast.patterns.norm.emit import emit
from recast.patterns.norm.pieces import (
    ADD,
    ANCHORS,
    MUL,
    SUB,
    affine,
    cast,
    computed,
    has_constant,
    mean,
    mean_square,
    normalised,
    roots,
    spread,
    square,
    suspicious,
)
from recast.patterns.norm.site import written
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import NormSite

__all__ = ["RULES"]

aten = torch.ops.aten

_X = cast(Any_("x", where=computed))


def _both(name: str, index: int, correction: str | None = None) -> Pattern:
    """One result of the operation that gives variance and mean at once."""
    dims, unbiased = Literal(f"{name}_dims"), Literal(correction)
    both = Either.of(
        Call.of(aten.var_mean.correction, _X, dims, correction=unbiased),
        Call.of(aten.var_mean.dim, _X, dims, unbiased),
    )
    return Call.of(operator.getitem, both, Literal(value=index), name=name)


_CENTRED = cast(Call.of(SUB, _X, spread(Either.of(mean(_X, "centre"), _both("centre", 1)))))
_DEVIATION = Either.of(
    Call.of(aten.std.correction, _X, Literal("variance_dims"), name="variance", correction=Literal("correction")),
    Call.of(aten.std.dim, _X, Literal("variance_dims"), Literal("correction"), name="variance"),
)


def _variance() -> Pattern:
    """The variance, as the mean square of what is centred, as ``mean(x^2) - mean(x)^2``, or as one operation."""
    moment = Call.of(SUB, cast(mean_square(_X)), cast(square(cast(mean(_X, "centre2")), "centre_square")))
    direct = Either.of(
        Call.of(aten.var.correction, _X, Literal("variance_dims"), name="variance", correction=Literal("correction")),
        Call.of(aten.var.dim, _X, Literal("variance_dims"), Literal("correction"), name="variance"),
        _both("variance", 0, "correction"),
    )
    return Either.of(mean_square(_CENTRED), direct, moment)


def _folded() -> Pattern:
    """``x f + (bias - mean f)`` with ``f = weight / sqrt(var + eps)``, as TensorFlow writes it."""
    factor = spread(roots(_variance())[0])
    scale = Call.of(MUL, Weight("weight"), factor, commutes=True, name="weighted", where=has_constant)
    centre = Call.of(MUL, spread(mean(_X, "centre")), scale, commutes=True)
    moved = Call.of(SUB, Weight("bias"), centre, where=has_constant)
    return Call.of(ADD, Call.of(MUL, _X, scale, commutes=True, name="normal"), moved, commutes=True, name="biased")


def _build(match: Match, around: Surroundings) -> NormSite | str:
    return written(match, around, flavour="layer", pattern="layer_norm")


def _build_folded(match: Match, around: Surroundings) -> NormSite | str:
    return written(match, around, flavour="layer", pattern="layer_norm_folded")


RULES = (
    Rule(
        "layer_norm",
        "norm",
        affine(normalised(_CENTRED, _variance(), _DEVIATION)),
        _build,
        anchors=ANCHORS,
        suspicious=suspicious,
        order=11,
        emit=emit,
    ),
    Rule(
        "layer_norm_folded",
        "norm",
        _folded(),
        _build_folded,
        anchors=ANCHORS,
        suspicious=suspicious,
        order=11,
        emit=emit,
    ),
)
