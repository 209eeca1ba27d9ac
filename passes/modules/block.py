"""`Block`: a feed-forward or attention block of a program that is being changed, with its matrices and their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from recast.passes.calibration import Calibration
from recast.passes.exact import Edit
from recast.passes.forms.stats import Stats, all_finite
from recast.passes.modules.flow import Picks, Refused, Way, spread
from recast.patterns.errors import FormError, WeightError
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite, LinearSite, MLPSite, MoESite, Piece, RotarySite

__all__ = ["Block", "labels_of_rows"]

aten = torch.ops.aten

# Values and output of attention are one block, queries and keys another: nothing of the one changes with the other.
ROLES = {"mlp": ("gate", "up", "down"), "attention": ("v", "o"), "attention:qk": ("q", "k")}
_PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.scaled_dot_product_attention.default}


class Block:
    """Linears that share an inner width, wherever the model uses them together.

    Attributes
    ----------
    name, kind
        Of the first site; for queries and keys with ``:qk``.
    sites
        Every place where these linears are used together.
    pieces
        Linears, or parts of packed ones, by role.
    """

    def __init__(
        self, edit: Edit, sites: Sequence[MLPSite | AttentionSite], kind: str, calibration: Calibration | None
    ) -> None:
        self.edit, self.calibration = edit, calibration
        self.sites: Sequence[MLPSite | AttentionSite | MoESite] = sites
        self.name, self.kind = sites[0].name + kind.removeprefix(sites[0].kind), kind
        self.pieces = {role: piece for role in ROLES[self.kind] if (piece := getattr(sites[0], role)) is not None}

    @cached_property
    def linears(self) -> dict[str, LinearSite]:
        """The linears by name, each once."""
        return {piece.site.name: piece.site for piece in self.pieces.values()}

    def piece(self, role: str) -> Piece:
        """The linear in a role, or its part; Refused unless it can be replaced by a smaller one.

        Raises
        ------
        WeightError
            Its weight was released.
        """
        if role not in self.pieces:
            raise Refused(f"no linear is known as its {role}")
        piece: Piece = self.pieces[role]
        for use in piece.site.uses:
            for name in piece.weights:
                weight = self.edit.weights[name]
                if weight.untyped_storage().nbytes() == 0 and weight.numel():
                    raise WeightError(
                        f"the dense weight of '{piece.name}' was released before '{self.name}' was made smaller; "
                        "load the model again"
                    )
            if (reason := self.edit.plain(use) or self.edit.exclusive(piece.site)) is not None:
                raise Refused(f"'{piece.name}' cannot be made anew: {reason}")
        return piece

    def rows(self, role: str) -> Tensor:
        """Which rows of its linear's matrix the piece in a role is."""
        piece = self.piece(role)
        ranges = next((p.rows for p in piece.site.parts if p.name == piece.part), ((0, piece.site.out_features),))
        return torch.cat([torch.arange(start, stop) for start, stop in ranges])

    def matrix(self, role: str) -> Tensor:
        """The whole matrix of the linear in a role, (out_features, in_features)."""
        matrix = self.edit.matrix(self.piece(role).site.uses[0]).value(self.edit.weights)
        if not all_finite(matrix):
            raise WeightError(
                f"'{self.piece(role).name}' in '{self.name}' holds values that are NaN or infinite; "
                "repair the checkpoint or leave this block out"
            )
        return matrix

    def bias(self, role: str) -> Tensor | None:
        """The bias of the linear in a role."""
        made = self.edit.bias(self.piece(role).site.uses[0])
        return None if made is None else made.value(self.edit.weights)

    def stats(self, role: str, form: object) -> Stats:
        """Statistics of the inputs of the linear in a role; FormError where there are none."""
        name = self.pieces[role].site.name
        if self.calibration is None or name not in self.calibration:
            missing = "" if self.calibration is None else f" and this calibration has seen none of '{name}'"
            raise FormError(
                f"{form}: '{self.name}' is fitted to what flows through it{missing}; pass statistics, "
                "recast.plan(program, recipe, recast.calibrate(program, batches)), or on the command line --calibration"
            )
        stats = self.calibration.of(name)
        stats.check(self.pieces[role].site.in_features, name)
        return stats

    def way(
        self, labels: Mapping[str, Tensor], end: str | None, picks: Picks | None = None
    ) -> tuple[dict[fx.Node, Tensor], Way]:
        """Follow features from some linears to another.

        Parameters
        ----------
        labels
            Of the rows of each linear that makes features, by its name.
        end
            The linear that takes them; None for queries and keys, which end in a product with each other.
        picks
            As `spread` takes it.

        Returns
        -------
        The values it begins with, with their labels, and the way.
        """
        sources = {use.node: labels[name].to(torch.int32) for name in labels for use in self.linears[name].uses}
        if end is None:
            return sources, spread(sources, {self.product(site) for site in self.sites}, self.edit.position, picks)
        ending = self.linears[end]
        way = spread(sources, {use.product for use in ending.uses}, self.edit.position)
        for use in ending.uses:
            if use.x not in way:
                raise Refused(f"'{end}' also takes '{use.x.name}', which comes from elsewhere")
        return sources, way

    def rotary(self) -> list[RotarySite]:
        """Rotary embeddings of the program."""
        found = recognise(self.edit.program, self.edit.constants).sites
        return [site for site in found if isinstance(site, RotarySite)]

    def product(self, site: MLPSite | AttentionSite | MoESite) -> fx.Node:
        """Where queries and keys of an attention are multiplied."""
        query: fx.Node | None = getattr(site, "query", None)
        users = list(query.users) if query is not None else []
        found = [n for n in users if n in site.nodes and n.target in _PRODUCTS]
        if len(found) != 1:
            raise Refused("the product of its queries and keys cannot be told from the graph")
        return found[0]

    def arriving(self, labels: Mapping[str, Tensor], end: str) -> Tensor:
        """Labels of the features that a linear takes, the same at each of its uses; int32 (in_features,)."""
        _, way = self.way(labels, end)
        found = [way[use.x] for use in self.linears[end].uses]
        first: Tensor = found[0].reshape(-1, found[0].shape[-1])[0]
        if any(not torch.equal(other, first.expand(other.shape)) for other in found):
            raise Refused(f"'{end}' takes features in another order at each token or use")
        return first


def labels_of_rows(block: Block, roles: Sequence[str], width: int) -> dict[str, Tensor]:
    """Numbers of `width` hidden features by the rows that make them, for each linear that does: those in some roles."""
    found: dict[str, Tensor] = {}
    for role in roles:
        if role not in block.pieces:
            continue
        piece = block.piece(role)
        size = piece.site.out_features
        labels = found.setdefault(piece.site.name, torch.full((size,), -1, dtype=torch.int32))
        rows = block.rows(role)
        if len(rows) == 2 * width:  # gate and up by halves, as `glu` has them
            labels.copy_(torch.arange(size, dtype=torch.int32) % width)
        elif len(rows) == width:
            labels[rows] = torch.arange(width, dtype=torch.int32)
        else:
            raise Refused(f"'{piece.name}' makes {len(rows)} features for {width}")
    return found
