"""From a match of a written-out normalisation to its `NormSite`, or to the reason why it is none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from recast.patterns.language import CASTS, COPIES, Match, Scope
from recast.patterns.norm.pieces import ADD, DIV, MUL, SUB
from recast.patterns.program import fixed_size
from recast.patterns.rules import Surroundings
from recast.patterns.sites import NormSite, source_line

__all__ = ["module_path", "same_size", "site_name", "written"]

aten = torch.ops.aten

_MEETING = frozenset({*ADD, *SUB, *MUL, *DIV})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int})


def written(match: Match, around: Surroundings, *, flavour: str, pattern: str) -> NormSite | str:
    """Check a match and describe it.

    Parameters
    ----------
    match
        With the names that `recast.patterns.norm.pieces` binds.
    around
        The program.
    flavour
        ``layer``, ``rms`` or ``l2``.
    pattern
        Name of the rule.

    Returns
    -------
    NormSite or str
        A reason, if the sums are not over the last dimension, or what follows does not fit.
    """
    x, normal, root = match["x"], match["normal"], match.root
    value = x.meta["val"]
    features = fixed_size(value.shape[-1]) if value.ndim else None
    if features is None:
        return f"'{x.name}' has no fixed number of features"
    reason = _statistic(match, value, features)
    if reason:
        return reason
    grouped = _grouped(match, x, normal)
    if isinstance(grouped, str):
        return grouped
    x, groups = _source(grouped[0]), grouped[1]
    features *= groups
    shape = _val(root).shape
    for role in ("weight", "bias"):
        constant = match.get(role)
        if role == "weight" and match.get("weighted") is not None and _val(constant).numel() == 1:
            continue  # nothing in the graph is the norm without this number
        if constant is not None and not _fits(_val(constant), shape):
            return (
                f"the {role} has shape {tuple(_val(constant).shape)}, what it meets has {tuple(shape)}: "
                f"{shape[-1]} values along the last dimension are needed"
            )
    weight, offset = offset_of(match.get("weight"), around.scope)
    sources = [n for c in (match.get("weight"), match.get("bias")) if c is not None for n in names_of(c, around)]
    compute, product, between, first = _dtypes(match, x, weight)
    return NormSite(
        name=site_name(sources, normal),
        weights=tuple(dict.fromkeys(sources)),
        node=root,
        nodes=match.nodes,
        pattern=pattern,
        where=source_line(normal),
        flavour=flavour,
        x=x,
        weight=weight,
        bias=match.get("bias"),
        offset=offset,
        eps=_epsilon(match, value),
        eps_at=_epsilon_at(match),
        features=features,
        groups=groups,
        weight_first=first,
        compute=compute,
        product=product,
        between=between,
    )


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _epsilon(match: Match, value: Tensor) -> float:
    if "given" in match.bound:  # one operation of torch, which has a choice of its own where nothing is given
        given = match["given"]
        return float(torch.finfo(value.dtype).eps) if given is None else float(given)
    eps = float(match.get("eps", 0.0))
    # The root of a square that is at least eps is a root that is at least the root of eps.
    return math.sqrt(eps) if match.get("bounded") is not None else eps


def _epsilon_at(match: Match) -> str:
    if match.get("outside") is not None:
        return "outside"
    return "floor" if match.get("floor") is not None or match.get("bounded") is not None else "inside"


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input; asking adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a is b or (isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr):
        return True
    return statically_known_true(a == b)


def _statistic(match: Match, value: Any, features: int) -> str:
    """Why the sums are not those of a norm over the last dimension; empty if they are."""
    names = [name for name in ("sum", "mean", "variance", "norm", "centre", "centre2") if match.get(name) is not None]
    dot = match.get("dot")
    if dot is not None:  # what it sums over is in its form
        names.append("dot")
    for name in names:
        dims = match.get(f"{name}_dims")
        dims = [-1] if name == "dot" else dims if isinstance(dims, list) else [dims]
        if any(not isinstance(d, int) for d in dims) or {d % value.ndim for d in dims} != {value.ndim - 1}:
            what = "mean" if name.startswith("centre") else name
            return (
                f"the {what} '{match[name].name}' is over dimension {', '.join(map(str, dims))} of {value.ndim}; "
                "a norm takes the last"
            )
        count, share = match.get(f"{name}_count"), match.get(f"{name}_share")
        if (count is not None and abs(count - features) > 1e-6 * features) or (
            share is not None and abs(share * features - 1) > 1e-6
        ):
            return f"the sum '{match[name].name}' is not divided by its {features} terms"
    for share in (match.get("norm_root_share"), 1 / count if (count := match.get("norm_root_count")) else None):
        if share is not None and abs(share * share * features - 1) > 1e-6:
            return f"the norm '{match['norm'].name}' is not divided by the root of its {features} terms"
    if "correction" in match.bound and match["correction"] not in (0, False):
        spread = "variance" if str(match["variance"].target).find("std") < 0 else "deviation"
        return f"the {spread} '{match['variance'].name}' is the unbiased one (divided by n - 1)"
    if not _aligned(match, value.ndim):
        return "the sum dropped its dimension: it meets other values than those it is of"
    shape = _val(match["normal"]).shape
    if len(shape) != value.ndim or not all(same_size(a, b) for a, b in zip(shape, value.shape, strict=True)):
        return "the result has another shape than what was summed"
    return ""


def _aligned(match: Match, ndim: int) -> bool:
    """Whether every statistic keeps the dimensions of x, so that it meets the values it is of."""
    for node in match.nodes[: match.nodes.index(match["normal"]) + 1]:
        operands = [n.meta.get("val") for n in node.all_input_nodes]
        if node.target is aten.unsqueeze.default:
            if node.args[1] not in (-1, ndim - 1):
                return False
        elif node.target is aten.expand.default:
            if any(isinstance(held, Tensor) and held.ndim != ndim for held in operands):
                return False
        elif node is match.get("weighted") or match.get("bias") in node.all_input_nodes:
            continue  # weight and bias have fewer dimensions; whether they fit is asked for itself
        elif node.target in _MEETING and len({v.ndim for v in operands if isinstance(v, Tensor) and v.ndim}) > 1:
            return False  # between a sum and its unsqueeze all values lack the dimension; only a mixture is wrong
    return bool(_val(match["normal"]).ndim == ndim)


def _grouped(match: Match, x: fx.Node, normal: fx.Node) -> tuple[fx.Node, int] | str:
    """What is normalised and in how many groups, if views stand between the product and the weight."""
    scaled = match.get("scaled")
    if scaled is None:
        return x, 1
    before, after = _val(normal).shape, _val(scaled).shape
    if len(before) == len(after) and all(same_size(a, b) for a, b in zip(before, after, strict=True)):
        return (x, 1) if not _rearranged(match, normal) else "what is normalised is rearranged before the weight"
    source = x.args[0] if x.op == "call_function" and x.target in _VIEWS else None
    groups, size = fixed_size(before[-2]) if len(before) > 1 else None, fixed_size(before[-1])
    if not isinstance(source, fx.Node) or groups is None or size is None:
        return "what is normalised is rearranged before the weight"
    flat = _val(source).shape
    kept = len(flat) == len(after) == len(before) - 1 and same_size(flat[-1], groups * size)
    if not kept or not all(
        same_size(a, b) and same_size(b, c) for a, b, c in zip(flat[:-1], after[:-1], before[:-2], strict=True)
    ):
        return "what is normalised is rearranged before the weight"
    return source, groups


def _rearranged(match: Match, normal: fx.Node) -> bool:
    """Whether anything but a cast stands between the product and the weight."""
    later = match.nodes[match.nodes.index(normal) + 1 :]
    allowed = CASTS | COPIES | {normal.target, match["scaled"].target, *ADD}
    return any(node.target not in allowed for node in later)


def _fits(constant: Tensor, shape: Any) -> bool:
    """Whether a constant is a weight of the last dimension: one value a feature, or that for each head."""
    if constant.ndim == 0 or constant.ndim > len(shape) or not same_size(constant.shape[-1], shape[-1]):
        return False
    wide = [i for i in range(2, constant.ndim + 1) if constant.shape[-i] != 1]
    return not wide or (len(shape) > 3 and len(wide) == 1 and same_size(constant.shape[-wide[0]], shape[-wide[0]]))


def offset_of(weight: fx.Node | None, scope: Scope) -> tuple[fx.Node | None, float]:
    """Take ``1 + weight`` apart."""
    inner = weight
    while inner is not None and inner.op == "call_function" and inner.target in CASTS:
        inner = inner.args[0] if isinstance(inner.args[0], fx.Node) else None
    if weight is None or inner is None or inner.op != "call_function" or inner.target not in ADD or inner.kwargs:
        return weight, 0.0
    nodes = [a for a in inner.args if isinstance(a, fx.Node)]
    numbers = [a for a in inner.args if isinstance(a, int | float)]
    if len(nodes) != 1 or len(numbers) != 1:
        return weight, 0.0
    same = inner is weight or _val(inner).dtype == _val(weight).dtype
    return (nodes[0], float(numbers[0])) if same else (weight, 0.0)


def _source(x: fx.Node) -> fx.Node:
    """What x was before casts that lose nothing."""
    while x.op == "call_function" and x.target in CASTS and isinstance(x.args[0], fx.Node):
        before, after = _val(x.args[0]).dtype, _val(x).dtype
        if not before.is_floating_point or torch.promote_types(before, after) != after:
            break
        x = x.args[0]
    return x


def _dtypes(
    match: Match, x: fx.Node, weight: fx.Node | None
) -> tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None, bool]:
    """Dtypes of statistics, product and what meets the weight, where they differ from the step before."""
    start, root = _val(x).dtype, _val(match.root).dtype
    normal = match["normal"]
    held = next((match[name] for name in ("square", "variance", "norm", "dot") if match.get(name) is not None), normal)
    compute, product = _val(held).dtype, _val(normal).dtype
    between, scaled = product, match.get("scaled")
    if scaled is not None:
        between = next(_val(a).dtype for a in scaled.args[:2] if isinstance(a, fx.Node) and a is not match["weight"])
    elif (biased := match.get("biased")) is not None:
        between = next(_val(a).dtype for a in biased.args[:2] if isinstance(a, fx.Node) and a is not match["bias"])
    first = weight is not None and between != root and torch.promote_types(between, root) == between
    return (
        compute if compute != start else None,
        product if product != compute else None,
        between if between != product else None,
        first,
    )


def names_of(constant: fx.Node, around: Surroundings) -> tuple[str, ...]:
    """Original names of the parameters that a constant is made of."""
    return around.scope.constants.sources.get(constant, ())


def site_name(sources: list[str], node: fx.Node) -> str:
    """The module that owns the parameters; without any, the module that computed the value, or the value's name."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in sources))
    return owners[0] if owners else module_path(node) or node.name


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that computed a value, as capture recorded it; empty if not known."""
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1] if stack else None
    path = last[0] if isinstance(last, tuple | list) and last else ""
    return str(path).removeprefix("L['self'].").removeprefix("L['self']") if isinstance(path, str) else ""


def result_dtype(site: NormSite) -> torch.dtype | None:
    """The dtype of the result, if it is not what the last step gives by itself."""
    assert site.node is not None
    assert site.x is not None
    natural = site.between or site.product or site.compute or _val(site.x).dtype
    for constant in (site.weight, site.bias):
        if constant is not None and _val(constant).ndim:
            natural = torch.promote_types(natural, _val(constant).dtype)
    found: torch.dtype = _val(site.node).dtype
    return None if found == natural else found
