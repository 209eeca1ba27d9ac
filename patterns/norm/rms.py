"""RMSNorm and L2 norm written out: ``x / sqrt(mean(x^2) + eps)`` and ``x / sqrt(sum(x^2) + eps)``, then maybe a weight."""

from __future__ import annotations

from recast.patterns.language import Any_, Call, Either, Literal, Match, Pattern
from recast.patterns.norm.emit import emit
from recast.patterns.norm.pieces import (
    ANCHORS,
    DIV,
    MUL,
    NORMS,
    affine,
    cast,
    computed,
    mean_square,
    normalised,
    sum_square,
    suspicious,
)
from recast.patterns.norm.site import written
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import NormSite

__all__ = ["RULES"]

_X = cast(Any_("x", where=computed))
_NORM = Call.of(NORMS, _X, Literal(value=2), Literal("norm_dims"), name="norm")
_ROOT = Either.of(
    Call.of(MUL, cast(_NORM), Literal("norm_root_share"), commutes=True),
    Call.of(DIV, cast(_NORM), Literal("norm_root_count")),
)


def _rms() -> Pattern:
    return affine(normalised(_X, mean_square(_X), _ROOT))


def _l2() -> Pattern:
    return affine(normalised(_X, sum_square(_X), _NORM))


def _build_rms(match: Match, around: Surroundings) -> NormSite | str:
    return written(match, around, flavour="rms", pattern="rms_norm")


def _build_l2(match: Match, around: Surroundings) -> NormSite | str:
    return written(match, around, flavour="l2", pattern="l2_norm")


RULES = (
    Rule("rms_norm", "norm", _rms(), _build_rms, anchors=ANCHORS, suspicious=suspicious, order=12, emit=emit),
    Rule("l2_norm", "norm", _l2(), _build_l2, anchors=ANCHORS, suspicious=suspicious, order=13, emit=emit),
)
