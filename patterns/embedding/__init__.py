"""Embeddings: tables that rows are looked up in, and the linear that shares one."""

from __future__ import annotations

import torch

from recast.patterns.language import Call, Match, Weight
from recast.patterns.rules import Rule, Surroundings
from recast.patterns.sites import EmbeddingSite, Piece, source_line

__all__ = ["RULES"]

aten = torch.ops.aten

_LOOKUP = aten.embedding.default


def _build(match: Match, around: Surroundings) -> EmbeddingSite | str:
    table = match["table"]
    sources = around.scope.constants.sources[table]
    shape = table.meta["val"].shape
    if len(shape) != 2:
        return f"the table has {len(shape)} dimensions, an embedding has two"
    heads = around.reading(sources)
    name = sources[0].removesuffix(".weight")
    return EmbeddingSite(
        name=name if name not in around.linear else f"{name}.table",
        weights=tuple(sources),
        rows=int(shape[0]),
        features=int(shape[1]),
        head=Piece(heads[0]) if heads else None,
        node=match.root,
        nodes=match.nodes,
        pattern="embedding",
        where=source_line(match.root),
    )


_TABLE = Weight("table", where=lambda value, scope: value.meta["val"].is_floating_point())

RULES = (Rule("embedding", "embedding", Call.of(_LOOKUP, _TABLE), _build, frozenset({_LOOKUP}), order=60),)
