"""Rotary embeddings: ``x cos + turned(x) sin``, pair by pair, or as complex numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.language import CASTS, COPIES, Any_, Call, Either, Match, Pattern, Scope, Through, among
from recast.patterns.norm.site import module_path
from recast.patterns.rotary.dialect import rotary, rotary_complex
from recast.patterns.rotary.pieces import Joined, Part, joined, part_read, range_read, same_rows
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import RotarySite, source_line

__all__ = ["RULES"]

aten = torch.ops.aten

_MUL, _ADD, _SUB, _NEG = (aten.mul.Tensor,), (aten.add.Tensor,), (aten.sub.Tensor,), (aten.neg.default,)
_SAME = CASTS | COPIES
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})


def _cast(inner: Pattern) -> Pattern:
    return Through(inner, CASTS | COPIES)


def _is_turned(node: fx.Node, scope: Scope) -> bool:
    """Whether a summand is a product with something joined: most sums are not, and need no closer look."""
    return any(
        isinstance(m, fx.Node)
        and m.target is aten.mul.Tensor
        and any(isinstance(a, fx.Node) and joined(_uncast(a)) is not None for a in m.args[:2])
        for m in node.args[:2]
    )


def _uncast(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and among(node, _SAME) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_X = _cast(Any_("x", where=lambda v, s: isinstance(v, fx.Node) and isinstance(v.meta.get("val"), Tensor)))
_FIRST, _SECOND = _cast(Part(0, _X)), _cast(Part(1, _X))


def _turned_sum() -> Pattern:
    """``x cos + turned(x) sin``, where ``turned`` swaps the features of pairs and negates one."""
    ways = Either.of(
        Joined((Call.of(_NEG, _SECOND), _FIRST), "joined"),
        Joined((_SECOND, Call.of(_NEG, _FIRST, name="inverse")), "joined"),
    )
    turned = Call.of(_MUL, _cast(ways), Any_("sin"), commutes=True)
    return Call.of(
        _ADD,
        _cast(turned),
        _cast(Call.of(_MUL, _X, Any_("cos"), commutes=True)),
        commutes=True,
        where=_is_turned,
        name="core",
    )


def _times(part: Pattern, name: str) -> Pattern:
    return _cast(Call.of(_MUL, part, Any_(name), commutes=True))


def _pairwise() -> Pattern:
    """``(a cos - b sin, b cos + a sin)``, joined."""
    forth = (
        Call.of(_SUB, _times(_FIRST, "cos"), _times(_SECOND, "sin"), name="core"),
        Call.of(_ADD, _times(_SECOND, "cos"), _times(_FIRST, "sin"), commutes=True),
    )
    back = (
        Call.of(_ADD, _times(_FIRST, "cos"), _times(_SECOND, "sin"), commutes=True, name="core"),
        Call.of(_SUB, _times(_SECOND, "cos"), _times(_FIRST, "sin"), name="inverse"),
    )
    return Either.of(Joined(forth, "joined"), Joined(back, "joined"))


def _complex() -> Pattern:
    """``(a + ib) turn`` on neighbours."""
    pairs = Call.of(aten.view_as_complex.default, Call.of(_VIEWS, _X, name="pairs"))
    product = Call.of(_MUL, pairs, Any_("turn"), commutes=True, name="core")
    return Call.of(_VIEWS, Call.of(aten.view_as_real.default, product), where=_is_real, name="flat")


def _is_real(node: fx.Node, scope: Scope) -> bool:
    return getattr(node.args[0], "target", None) is aten.view_as_real.default


def _ended(core: Pattern) -> Pattern:
    """What may follow: a cast back, and what was not rotated, joined again."""
    seen = _cast(core)
    partial = Either.of(
        Joined((seen, Any_("after")), "outer", ("half",)), Joined((Any_("before"), seen), "outer", ("half",))
    )
    back = Call.of(list(CASTS), Either.of(partial, core), where=_only_reader)
    return Either.of(back, partial, core)


def _only_reader(node: fx.Node, scope: Scope) -> bool:
    source, value = node.args[0], node.meta.get("val")
    return (
        isinstance(source, fx.Node)
        and len(source.users) == 1
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and source.target in (*_ADD, aten.cat.default, *_VIEWS)
    )


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _source(x: fx.Node) -> fx.Node:
    """What x was before casts that lose nothing."""
    while x.op == "call_function" and x.target in CASTS and isinstance(x.args[0], fx.Node):
        before, after = _val(x.args[0]).dtype, _val(x).dtype
        if torch.promote_types(before, after) != after:
            break
        x = x.args[0]
    return x


def _site(match: Match, pattern: str, **known: Any) -> RotarySite:
    core = match["core"]
    path = module_path(core)
    name = f"{path}.rotary" if path else core.name
    return RotarySite(
        name=name, weights=(), node=match.root, nodes=match.nodes, pattern=pattern, where=source_line(core), **known
    )


def _build(match: Match, around: Surroundings) -> RotarySite | str:
    x, layout, joined_by = match["x"], match["layout"], match["joined"]
    value = _val(x)
    for name in ("cos", "sin"):
        if not isinstance(match[name], fx.Node) or not isinstance(match[name].meta.get("val"), Tensor):
            return f"'{match[name]}' is no tensor of angles"
    if layout != joined_by:
        if layout == "half" or not _is_pairwise(match):
            return f"features are taken as {layout} pairs and joined as {joined_by} ones"
        layout = "unwoven"
    found = _place(match, x)
    if isinstance(found, str):
        return found
    source, start = found
    compute = _val(match["core"]).dtype
    return _site(
        match,
        "rotary",
        x=source,
        cos=match["cos"],
        sin=match["sin"],
        layout=layout,
        rotated=int(value.shape[-1]),
        start=start,
        inverse="inverse" in match.bound,
        compute=compute if compute != _val(source).dtype else None,
    )


def _place(match: Match, x: fx.Node) -> tuple[fx.Node, int] | str:
    """What is rotated, with the features that pass, and where the rotated ones begin in it."""
    rest = match.get("after", match.get("before"))
    if rest is None:
        return _source(x), 0
    if not isinstance(rest, fx.Node):
        return f"'{rest}' is joined to the result, and is no tensor"
    found = _whole(x, rest, before="before" in match.bound)
    if isinstance(found, str):
        return found
    whole, start = found
    source = _source(whole)
    return (source if _val(match.root).dtype == _val(source).dtype else whole), start


def _is_pairwise(match: Match) -> bool:
    """Whether the parts were multiplied before they were joined."""
    return any(node.target in _SUB for node in match.nodes)


def _whole(x: fx.Node, rest: fx.Node, *, before: bool) -> tuple[fx.Node, int] | str:
    """What x and the features that pass are parts of, and where x begins in it."""
    mine, other = range_read(_uncast(x)), range_read(_uncast(rest))
    if mine is None or other is None or _uncast(mine[0]) is not _uncast(other[0]) or mine[3] != 1 or other[3] != 1:
        return f"'{rest.name}' joins the result, and is not what was left of '{x.name}'"
    total = int(_val(mine[0]).shape[-1])
    first, second = (other, mine) if before else (mine, other)
    if (first[1], first[2], second[2]) != (0, second[1], total):
        return f"'{rest.name}' and '{x.name}' do not make up '{mine[0].name}'"
    return mine[0], mine[1]


def _build_complex(match: Match, around: Surroundings) -> RotarySite | str:
    x, pairs = match["x"], match["pairs"]
    value, shape, flat = _val(x), _val(pairs).shape, match["flat"]
    if len(shape) != value.ndim + 1 or shape[-1] != 2 or 2 * shape[-2] != value.shape[-1] or not same_rows(x, pairs):
        return f"'{x.name}' is not seen as pairs of neighbours"
    if _val(flat).shape[-1] != value.shape[-1] or not same_rows(flat, flat.args[0]):
        return "the result is not arranged as what was rotated"
    if not isinstance(match["turn"], fx.Node) or not _val(match["turn"]).is_complex():
        return f"'{match['turn']}' holds no complex factors"
    found = _place(match, x)
    if isinstance(found, str):
        return found
    source, start = found
    return _site(
        match,
        "rotary_complex",
        x=source,
        cos=match["turn"],
        layout="interleaved",
        rotated=int(value.shape[-1]),
        start=start,
        compute=value.dtype if value.dtype != _val(source).dtype else None,
    )


def _emit(site: RotarySite) -> Any:
    assert site.x is not None
    assert site.node is not None
    value = _val(site.x)
    options: dict[str, Any] = {"layout": site.layout} | _range(site)
    options |= {"inverse": True} if site.inverse else {}
    return rotary, (site.x, site.cos, site.sin), options | _dtypes(site, value.dtype)


def _emit_complex(site: RotarySite) -> Any:
    assert site.x is not None
    return rotary_complex, (site.x, site.cos), _range(site) | _dtypes(site, _val(site.x).dtype)


def _range(site: RotarySite) -> dict[str, Any]:
    """Which features are rotated, if not all."""
    whole = site.rotated == _val(site.x).shape[-1]  # type: ignore[arg-type]
    return {} if whole else {"start": site.start, "rotated": site.rotated}


def _dtypes(site: RotarySite, start: torch.dtype) -> dict[str, Any]:
    """Dtypes of the rotation and the result, where they are not what follows from the operands."""
    natural = site.compute or start
    for operand in (site.cos, site.sin):
        if operand is not None:
            turned = _val(operand).dtype
            natural = torch.promote_types(natural, turned.to_real() if turned.is_complex else turned)
    options = {} if site.compute is None else {"compute": site.compute}
    result = _val(site.node).dtype  # type: ignore[arg-type]
    return options if result == natural else options | {"dtype": result}


def _swaps(node: fx.Node, around: Surroundings) -> bool:
    """Whether what is negated is half of something, joined with the other half: the mark of a rotation."""
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and part_read(_uncast(source)) is not None
        and any(user.target in (aten.cat.default, aten.stack.default) for user in node.users)
    )


RULES = (
    Rule(
        "rotary",
        "rotary",
        _ended(Either.of(_turned_sum(), _pairwise())),
        _build,
        anchors=frozenset(_NEG),
        suspicious=_swaps,
        order=20,
        emit=_emit,
    ),
    Rule(
        "rotary_complex",
        "rotary",
        _ended(_complex()),
        _build_complex,
        anchors=frozenset({aten.view_as_complex.default}),
        order=21,
        emit=_emit_complex,
    ),
)
