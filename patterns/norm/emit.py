"""The operation of the dialect that each kind of norm site stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recast.patterns.norm import dialect
from recast.patterns.norm.site import result_dtype
from recast.patterns.sites import NormSite

__all__ = ["Emitted", "emit", "emit_operation"]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "layer": dialect.layer_norm,
    "rms": dialect.rms_norm,
    "l2": dialect.l2_norm,
}
Emitted = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def emit(site: NormSite) -> Emitted:
    """A written-out norm."""
    options: dict[str, Any] = {"eps": site.eps}
    options |= {"eps_at": site.eps_at} if site.eps_at != "inside" else {}
    if site.flavour == "layer":
        options |= {"axes": site.axes} if site.axes != 1 else {}
    else:
        options |= {"groups": site.groups} if site.groups != 1 else {}
        options |= {"product": site.product} if site.product is not None else {}
    between = site.between if site.flavour != "layer" else site.between or site.product
    options |= {"offset": site.offset} if site.offset else {}
    options |= {k: v for k, v in (("compute", site.compute), ("between", between)) if v is not None}
    dtype = result_dtype(site)
    options |= {"dtype": dtype} if dtype is not None else {}
    return _FUNCTIONS[site.flavour], _operands(site), options


def emit_operation(site: NormSite) -> Emitted:
    """A norm that was one operation of torch."""
    x, weight, bias = site.x, site.weight, site.bias
    if site.flavour == "group":
        return dialect.group_norm, (x, weight, bias), {"groups": site.groups, "eps": site.eps}
    if site.flavour == "batch":
        return dialect.batch_norm, (x, site.mean, site.variance, weight, bias), {"eps": site.eps}
    return emit(site)


def _operands(site: NormSite) -> tuple[Any, ...]:
    if site.bias is not None:
        return site.x, site.weight, site.bias
    return (site.x, site.weight) if site.weight is not None else (site.x,)
