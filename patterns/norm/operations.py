"""Normalisations that are one operation of torch: layer, RMS, group and batch norm; a weight may follow one that has none."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor, fx

from recast.patterns.language import Any_, Call, Either, Literal, Match, Scope
from recast.patterns.norm.emit import emit, emit_operation
from recast.patterns.norm.pieces import affine, computed
from recast.patterns.norm.site import names_of, offset_of, site_name, written
from recast.patterns.program import fixed_size
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import NormSite, source_line

__all__ = ["RULES"]

aten = torch.ops.aten

_ONE = frozenset(
    {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default}
)  # a tensor each
_SEVERAL = frozenset(
    {
        aten.native_layer_norm.default,
        aten.native_group_norm.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.native_batch_norm.default,
        aten._fused_rms_norm.default,
    }
)  # the result, then statistics
_OPERATION = Either.of(
    Call.of(_ONE, name="operation"),
    Call.of(operator.getitem, Call.of(_SEVERAL, name="operation"), Literal(value=0), where=lambda n, s: n.args[1] == 0),
)


def _weightless(node: fx.Node, scope: Scope) -> bool:
    """Whether a norm over the last dimension leaves its weight and bias to others."""
    named = scope.named(node)
    return named["weight"] is None and named.get("bias") is None and len(named["normalized_shape"]) == 1


_BARE = Call.of(
    [aten.layer_norm.default, aten.rms_norm.default],
    Any_("x", where=computed),
    name="normal",
    where=_weightless,
    eps=Literal("given"),
)


def _build_bare(match: Match, around: Surroundings) -> NormSite | str:
    flavour = "layer" if match["normal"].target is aten.layer_norm.default else "rms"
    site = written(match, around, flavour=flavour, pattern="bare_norm_operation")
    value = match["x"].meta["val"]
    if isinstance(site, str) or flavour == "layer" or not _narrow(value):
        return site
    return dataclasses.replace(site, compute=torch.float32, between=site.between or value.dtype)


def _build(match: Match, around: Surroundings) -> NormSite | str:
    node = match["operation"]
    named = around.scope.named(node)
    x = named["input"]
    if not computed(x, around.scope):
        return f"'{x}' does not depend on inputs"
    kind = node.target._opname
    flavour = next(f for f in ("layer", "rms", "group", "batch") if f in kind)
    weight, offset = offset_of(named.get("weight"), around.scope)
    bias, mean, variance = named.get("bias"), named.get("running_mean"), named.get("running_var")
    constants = [n for n in (weight, bias, mean, variance) if isinstance(n, fx.Node)]
    for constant in constants:
        if constant not in around.scope.constants:
            return f"'{constant.name}' is computed, a weight is needed"
    if flavour == "batch" and (named.get("training") or not isinstance(mean, fx.Node)):
        return "statistics are those of the batch (training mode), not constants"
    if flavour in ("group", "batch") and offset:
        weight, offset = named["weight"], 0.0
    axes = len(named["normalized_shape"]) if flavour in ("layer", "rms") else 1
    if flavour == "rms" and axes > 1:
        return f"the mean square is over {axes} dimensions; a norm takes the last"
    value = x.meta["val"]
    groups = 1 if flavour != "group" else int(named["num_groups"] if "num_groups" in named else named["group"])
    sizes = value.shape[value.ndim - axes :] if flavour in ("layer", "rms") else value.shape[1:2]
    features = 1
    for size in sizes:
        features *= fixed_size(size) or 0
    eps = named.get("eps")
    sources = [name for constant in constants for name in names_of(constant, around)]
    return NormSite(
        name=site_name(sources, node),
        weights=tuple(dict.fromkeys(sources)),
        node=match.root,
        nodes=match.nodes,
        pattern="norm_operation",
        where=source_line(node),
        flavour=flavour,
        x=x,
        weight=weight,
        bias=bias,
        offset=offset,
        eps=float(torch.finfo(value.dtype).eps) if eps is None else float(eps),
        features=features // groups,
        groups=groups,
        axes=axes,
        mean=mean,
        variance=variance,
        weight_first=_narrow(value),
        compute=torch.float32 if flavour == "rms" and _narrow(value) else None,
    )


def _narrow(value: Tensor) -> bool:
    """Whether torch computes in float32 inside."""
    return value.dtype.itemsize < 4


_ANCHORS = _ONE | _SEVERAL
RULES = (
    Rule("bare_norm_operation", "norm", affine(_BARE), _build_bare, anchors=_ANCHORS, order=8, emit=emit),
    Rule("norm_operation", "norm", _OPERATION, _build, anchors=_ANCHORS, order=9, emit=emit_operation),
)
