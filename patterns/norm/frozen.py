"""Batch norm written out over its constants: ``x s + (bias - mean s)`` with ``s = weight / sqrt(variance + eps)``."""

from __future__ import annotations

import torch
from torch import fx

from recast.patterns.language import VIEWS, Any_, Call, Literal, Match, Pattern, Through, Weight
from recast.patterns.norm.emit import emit_operation
from recast.patterns.norm.pieces import ADD, MUL, SUB, computed, has_constant
from recast.patterns.norm.site import names_of, site_name
from recast.patterns.rules import Rule, Surroundings, never
from recast.patterns.sites import NormSite, source_line

__all__ = ["RULES"]

aten = torch.ops.aten


def _held(name: str) -> Pattern:
    """A tensor of the model, in whatever shape."""
    return Through(Weight(name, lambda value, scope: value.op == "get_attr" and value.meta["val"].ndim == 1), VIEWS)


def _pattern() -> Pattern:
    deviation = Call.of(aten.rsqrt.default, Call.of(ADD, _held("variance"), Literal("eps"), commutes=True))
    scale = Call.of(MUL, _held("weight"), deviation, commutes=True, name="scale")
    shift = Call.of(SUB, _held("bias"), Call.of(MUL, _held("mean"), scale, commutes=True))
    scaled = Call.of(MUL, Any_("x", computed), scale, commutes=True, where=has_constant)
    return Call.of(ADD, scaled, shift, commutes=True, where=has_constant)


def _build(match: Match, around: Surroundings) -> NormSite | str:
    x, scale = match["x"], match["scale"]
    value, shape = x.meta["val"], scale.meta["val"].shape
    if value.ndim < 2 or tuple(shape) != (1, value.shape[1], *(1 for _ in value.shape[2:])):
        return f"the statistics have shape {tuple(shape)}, channels of '{x.name}' {tuple(value.shape)} are needed"
    constants: list[fx.Node] = [match[name] for name in ("weight", "bias", "mean", "variance")]
    sources = [name for constant in constants for name in names_of(constant, around)]
    weight, bias, mean, variance = constants
    return NormSite(
        name=site_name(sources, match.root),
        weights=tuple(sources),
        node=match.root,
        nodes=match.nodes,
        pattern="frozen_batch_norm",
        where=source_line(match.root),
        flavour="batch",
        x=x,
        weight=weight,
        bias=bias,
        eps=float(match["eps"]),
        features=int(value.shape[1]),
        mean=mean,
        variance=variance,
    )


RULES = (Rule("frozen_batch_norm", "norm", _pattern(), _build, suspicious=never, order=10, emit=emit_operation),)
