"""Mixtures of experts: a router, a choice among its scores, and experts that the chosen tokens visit."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from recast.patterns.language import Call, Match
from recast.patterns.mlp import common_name
from recast.patterns.moe.experts import Experts, Tokens, latents, read_experts, read_tokens, weighed
from recast.patterns.moe.routing import ALL, CHOICES, LOOKUPS, Router, by_table, chooses, entrances, read_router
from recast.patterns.rules import Rule, Surroundings, never
from recast.patterns.sites import MoESite, Piece, source_line

__all__ = ["RULES"]

aten = torch.ops.aten

_ANCHORS = frozenset({aten.topk.default})


def _build(match: Match, around: Surroundings) -> MoESite | str:
    choice = match.root
    router = read_router(choice, around)
    if isinstance(router, str):
        return router
    read = _experts(router, around)
    if isinstance(read, str):
        return read
    tokens, experts = read
    count, scored = len(experts.by_role), router.site.out_features
    notes = [experts.note] if experts.note else []
    if count < 2:
        return f"one expert ('{next(iter(experts.by_role[0].values())).name}') is no mixture"
    if count < scored:
        notes.append(
            f"the router scores {scored} experts, {count} are in the graph: the others give their input or nothing, or were "
            "not visited by the captured example"
        )
    nodes = sorted({choice, *experts.nodes}, key=around.position.__getitem__)
    pieces = [piece for roles in experts.by_role for piece in roles.values()]
    names = [router.site.name, *(piece.site.name for piece in pieces)]
    return MoESite(
        name=common_name(names, router.site.name),
        weights=tuple(dict.fromkeys(w for p in (Piece(router.site), *pieces) for w in p.weights)),
        router=Piece(router.site),
        experts=experts.by_role,
        shared=experts.shared,
        top_k=router.top_k,
        scoring=router.scoring,
        renormalised=router.renormalised,
        corrected=router.corrected,
        groups=router.groups,
        scale=router.scale,
        dispatch=experts.dispatch,
        activation=experts.activation,
        x=tokens.x,
        notes=tuple(notes),
        node=nodes[-1],
        nodes=tuple(nodes),
        pattern="moe_of_all" if choice.target in ALL else "moe" if choice.target in CHOICES else "moe_by_table",
        where=source_line(choice),
    )


def _build_of_all(match: Match, around: Surroundings) -> MoESite | str:
    """A mixture in which every token visits every expert; what merely weighs features by scores is none."""
    router = read_router(match.root, around)
    if isinstance(router, str):
        return router
    if any(n.target in CHOICES for n in router.cone):
        return "a choice among the scores follows"
    site = _build(match, around)
    if isinstance(site, str) or len(site.experts) == router.site.out_features:
        return site
    return f"the router scores {router.site.out_features} experts, {len(site.experts)} are in the graph"


def _experts(router: Router, around: Surroundings) -> tuple[Tokens, Experts] | str:
    """Experts of what the router sees, or of what a linear makes of it; why there are none where they are looked for first."""
    reason = ""
    for x in entrances(router, around):
        tokens = read_tokens(router, around, x)
        experts = read_experts(router, tokens, around)
        for latent in latents(router, tokens, around) if isinstance(experts, str) else ():
            smaller = read_tokens(router, around, x, latent)
            found = read_experts(router, smaller, around)
            if not isinstance(found, str):
                tokens, experts = smaller, found
                break
        if not isinstance(experts, str):
            return tokens, experts
        reason = reason or experts
    return reason


def _suspicious(node: fx.Node, around: Surroundings) -> bool:
    """A choice among as many scores as some linear gives features: among experts, not among positions."""
    scores = node.args[0]
    value = scores.meta.get("val") if isinstance(scores, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(value.shape[-1], int):
        return False
    return not isinstance(read_router(node, around), str)


def _weighs(node: fx.Node, around: Surroundings) -> bool:
    """Whether as many matrices are weighed by scores as there are scores."""
    router = read_router(node, around)
    if isinstance(router, str) or router.site.out_features < 2 or any(n.target in CHOICES for n in router.cone):
        return False
    lasts = weighed(router, read_tokens(router, around, router.use.x), around, firsts=True)
    return len({site.name for last in lasts for site, _ in around.products(last)}) == router.site.out_features


RULES = (
    Rule("moe", "moe", Call(CHOICES, where=lambda node, scope: chooses(node)), _build, _ANCHORS, _suspicious, order=40),
    Rule("moe_by_table", "moe", Call(LOOKUPS, where=by_table), _build, suspicious=never, order=41),
    Rule("moe_of_all", "moe", Call(ALL), _build_of_all, ALL, _weighs, order=42),
)
