"""`Mixture`: the experts of a mixture as a block that is made smaller; stacks of matrices are, whatever multiplies with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from recast.passes.calibration import Calibration
from recast.passes.exact import Edit
from recast.passes.forms.stats import Stats, all_finite
from recast.passes.modules.block import Block, labels_of_rows
from recast.passes.modules.flow import Picks, Refused, Way, narrow, spread
from recast.passes.modules.form import Fit
from recast.passes.modules.marks import BLOCK, END
from recast.passes.modules.place import UNMOVED, Numbers, Place, chain_of, is_released, place_of
from recast.patterns.derivation import Derivation
from recast.patterns.errors import WeightError
from recast.patterns.linear.packing import size_hint
from recast.patterns.linear.routed import is_grouped
from recast.patterns.sites import LinearSite, MoESite, Piece, Use

__all__ = ["Mixture"]

aten = torch.ops.aten

_LOOKUPS = {aten.index.Tensor, aten.index_select.default}


class Mixture(Block):
    """The experts of a mixture, each with linears of its own and all of one inner width.

    Each expert may keep features of its own: what stands between its linears treats all of them alike, or the mixture is refused.

    Attributes
    ----------
    experts
        Linears by role, for each expert; `pieces` has them as ``0.gate`` ... too.
    """

    def __init__(self, edit: Edit, sites: Sequence[MoESite], kind: str, calibration: Calibration | None) -> None:
        self.edit, self.sites, self.calibration = edit, sites, calibration
        self.name, self.kind = sites[0].name, kind
        self.experts = sites[0].experts
        self.pieces = {f"{e}.{role}": piece for e, roles in enumerate(self.experts) for role, piece in roles.items()}
        self._places: dict[str, Place] = {}

    def piece(self, role: str) -> Piece:
        """The linear of an expert in a role, ``0.gate``; Refused unless its matrix can be replaced by a smaller one."""
        if role not in self.pieces:
            raise Refused(f"no linear is known as the {role.partition('.')[2]} of its experts")
        piece: Piece = self.pieces[role]
        return piece

    def role(self, expert: int, name: str) -> str:
        """A role that an expert has a linear in."""
        return next(f"{expert}.{role}" for role, piece in self.experts[expert].items() if piece.site.name == name)

    @cached_property
    def width(self) -> int:
        """The inner width; Refused if experts differ in it."""
        widths = {self.piece(f"{e}.down").site.in_features for e in range(len(self.experts))}
        if len(widths) != 1:
            raise Refused(f"its experts have inner widths from {min(widths)} to {max(widths)}")
        return widths.pop()

    def matrix(self, role: str) -> Tensor:
        """The whole matrix of a linear, a view of its parameter."""
        site = self.piece(role).site
        matrix = self.place(site).of(self.edit.weights[self.place(site).weight].detach())
        if not all_finite(matrix):
            raise WeightError(
                f"'{site.name}' in '{self.name}' holds values that are NaN or infinite; "
                "repair the checkpoint or leave this block out"
            )
        return matrix

    def bias(self, role: str) -> Tensor | None:
        """The bias of a linear."""
        name = self._bias(self.piece(role).site)
        return None if name is None else self.edit.weights[name]

    def seen(self, expert: int, form: object) -> Stats | None:
        """Statistics of what an expert's last linear takes; None where no token came by. FormError where there are none at all."""
        downs = [f"{e}.down" for e in range(len(self.experts))]
        known = [
            role for role in downs if self.calibration is not None and self.piece(role).site.name in self.calibration
        ]
        if not known:
            self.stats(downs[0], form)
        return self.stats(downs[expert], form) if downs[expert] in known else None

    def labels(self, expert: int) -> dict[str, Tensor]:
        """Numbers of an expert's hidden features by the rows that make them, for each linear that does."""
        return labels_of_rows(self, [f"{expert}.{role}" for role in ("up", "gate", "gate_up")], self.width)

    # ------------------------------------------------------------------ where the matrices lie

    def place(self, site: LinearSite) -> Place:
        """Where the matrix of a linear lies in its parameter; Refused if that cannot be told."""
        if site.name not in self._places:
            weights = self.edit.weights
            if released := next((n for n in site.weights if is_released(weights[n])), None):
                raise WeightError(
                    f"the dense weight '{released}' of '{site.name}' was released before '{self.name}' was made smaller; "
                    "load the model again"
                )
            places = {place_of(site, use, weights) for use in site.uses}
            if len(places) != 1:
                raise Refused(f"'{site.name}' reads its matrix in several ways")
            self._places[site.name] = places.pop()
        return self._places[site.name]

    def _bias(self, site: LinearSite) -> str | None:
        """Name of the parameter that is the bias of a linear and of nothing else."""
        biases = {use.bias for use in site.uses}
        if biases == {None}:
            return None
        (node, *others) = biases
        if others or node is None or node.op != "get_attr" or any(use.index is not None for use in site.uses):
            raise Refused(f"the bias of '{site.name}' is not a parameter of its own")
        return str(node.target)

    def check_readers(self) -> None:
        """Refuse parameters that something else reads, or holds a part of."""
        held: dict[str, int] = {}
        own: dict[str, set[fx.Node]] = {}
        lasts = {roles["down"].site.name for roles in self.experts}
        for site in self.linears.values():
            bias = self._bias(site) if site.name not in lasts else None
            for name in [self.place(site).weight] + ([] if bias is None else [bias]):
                nodes = own.setdefault(name, set())
                for use in site.uses:
                    nodes |= {use.product, use.node, *(use.routing.nodes if use.routing is not None else ())}
            name = self.place(site).weight
            held[name] = held.get(name, 0) + site.parameters
        for name, nodes in own.items():
            if others := [n for n in self.edit.readers.get(name, {}) if n not in nodes]:
                raise Refused(f"its weight '{name}' is also read by '{others[0].name}'")
            if any(kind == "weight" and n == name for _, kind, n in self.edit.program.interface.mutations):
                raise Refused(f"the model writes to '{name}'")
        for name, count in held.items():
            if count != self.edit.weights[name].numel():
                raise Refused(f"its experts are {count:,} of {self.edit.weights[name].numel():,} elements of '{name}'")

    # ------------------------------------------------------------------ the way from the first linears to the last

    def experts_way(self) -> tuple[dict[fx.Node, Tensor], Way, list[Numbers]]:
        """Follow hidden features, numbered as they leave the first linears, to the last ones, which must take them in order.

        Returns
        -------
        Where it begins, with labels, the way, and what holds a number for each feature of each expert: biases.
        """
        sources: dict[fx.Node, Tensor] = {}
        lasts: dict[fx.Node, Use] = {}
        for expert, roles in enumerate(self.experts):
            for name, labels in self.labels(expert).items():
                for use in self.linears[name].uses:
                    found = _along(use.node, self._result_axis(use), labels)
                    if not torch.equal(sources.setdefault(use.node, found), found):
                        raise Refused(f"'{use.node.name}' gives hidden features of experts in different order")
            lasts |= {use.product: use for use in roles["down"].site.uses}
        picks: Picks = {}
        way = spread(sources, set(lasts), self.edit.position, picks)
        for product, use in lasts.items():
            if use.x not in way:
                raise Refused(f"'{product.name}' takes '{use.x.name}', which comes from elsewhere")
        # Experts keep different features, under the same sizes: so whole runs of all features only, in order.
        wanted = torch.arange(self.width, dtype=torch.int32)
        for node, found in way.items():
            for labels in (found,) if isinstance(found, Tensor) else found:
                if not _in_runs(labels, wanted):
                    raise Refused(f"'{node.name}' tells hidden features apart")
        for use in lasts.values():
            axis = use.contraction.x.index(use.contraction.inputs) if len(use.contraction.inputs) == 1 else None
            if axis is None or not torch.equal(way[use.x], _along(use.x, axis, wanted)):
                raise Refused(f"'{use.product.name}' does not take each hidden feature once")
        numbers = [self._numbers(way[node], node, operand) for node, held in picks.items() for operand in held]
        return sources, way, numbers

    def _numbers(self, labels: Tensor, node: fx.Node, operand: fx.Node) -> Numbers:
        """A parameter with a row for each expert, as it is added to (or multiplied with) hidden features; Refused if it is none."""
        path: list[fx.Node] = [operand]
        while path[-1].op == "call_function" and path[-1].target in UNMOVED | _LOOKUPS:
            path.append(path[-1].args[0])  # type: ignore[arg-type]
        source, below = path[-1], path[:-1]
        name = str(source.target)
        why = f"'{operand.name}' holds a number for each feature, which '{node.name}' applies"
        if source.op != "get_attr" or sum(n.target in _LOOKUPS for n in below) > 1:
            raise Refused(why)
        held = self.edit.weights[name]
        experts = [self.place(roles["down"].site).fixed for roles in self.experts]
        line = labels.reshape(-1, labels.shape[-1])[0]
        numbered = all(len(fixed) == 1 for fixed in experts) and held.ndim == 2 and held.shape[0] == len(experts)
        if not numbered or held.shape[1] != len(line) or is_released(held):
            raise Refused(why)
        if others := [n for n in self.edit.readers.get(name, {}) if n not in (node, *below)]:
            raise Refused(f"{why}, and '{others[0].name}' reads '{name}' too")
        if others := [n for made in below if made.target in _LOOKUPS for n in made.users if n not in (node, *below)]:
            raise Refused(f"{why}, and '{others[0].name}' reads '{below[-1].name}' too")
        return Numbers(name, tuple(fixed[0][1] for fixed in experts), line, tuple(below))

    def _result_axis(self, use: Use) -> int:
        y = use.contraction.y if use.routing is None else use.routing.y
        if len(use.contraction.outputs) != 1 or len(y) != use.node.meta["val"].ndim:
            raise Refused(f"'{use.node.name}' has hidden features along several dimensions")
        return y.index(use.contraction.outputs)

    def check_fit(self, fit: Fit) -> None:
        """Refuse what cannot be put right, without changing anything."""
        sources, way, _ = self.experts_way()
        narrow(way, sources, fit.kept, change=False)
        for site in self.linears.values():
            for use in site.uses:
                if not is_grouped(use.product.target) or "fallback" in str(use.product.target):
                    continue
                unit = 16 // use.x.meta["val"].dtype.itemsize  # it loads 16 bytes at a time
                if fit.inner[1] % unit and not fit.inner[0] % unit:
                    raise Refused(
                        f"'{use.product.name}' ({use.product.target}) wants widths that are multiples of {unit}, this is "
                        f"{fit.inner[1]}; round_to={unit} would work"
                    )

    def replace(self, form: object, fit: Fit) -> None:
        """Put smaller matrices in place of the experts', and sizes on the way right."""
        sources, way, numbers = self.experts_way()
        narrow(way, sources, fit.kept)
        for node in way:
            node.meta[BLOCK] = self.name
        made: dict[str, Tensor] = {}
        for of in numbers:
            kept = {
                e: fit.stand_ins[roles["down"].site.name].columns
                for e, roles in zip(of.experts, self.experts, strict=True)
            }
            held = self.edit.weights[of.weight].detach()
            made[of.weight] = torch.stack([held[e, torch.isin(of.labels, kept[e])] for e in range(len(kept))])
            for node in of.nodes:
                node.meta[BLOCK] = self.name
                node.meta.pop("val", None)
        for name, new in fit.made.items():
            place = fit.places[name]
            held = self.edit.weights[place.weight]
            whole = made.setdefault(place.weight, held.new_empty(place.sizes(held.shape, new.matrix)))
            place.of(whole).copy_(new.matrix)
            if new.bias is not None and (bias := self._bias(self.linears[name])) is not None:
                made[bias] = new.bias
        for name, value in made.items():
            held = self.edit.weights[name]
            formula = Derivation.fitted(f"{form} of {self.name}", value.shape, Derivation.weight(name, held.shape))
            self.edit.values[formula] = value
            for old in self.edit.graph.find_nodes(op="get_attr", target=name):
                with self.edit.graph.inserting_before(old):
                    old.replace_all_uses_with(self.edit.weight(name, formula, held, (name,)))
        ends = {use.node for roles in self.experts for use in roles["down"].site.uses}
        for site in self.linears.values():
            for use in site.uses:
                chain = chain_of(use.weight)
                for node in (*chain, *(use.routing.nodes if use.routing is not None else ()), use.product, use.node):
                    node.meta[BLOCK] = self.name
                    node.meta.pop("val", None)
                    if node in ends:
                        node.meta[END] = node.name
        self.edit.did(f"{self.name}: {form}, {fit.inner[0]} -> {fit.inner[1]} features of each expert")


def _along(node: fx.Node, axis: int, labels: Tensor) -> Tensor:
    """Labels along one dimension of a value."""
    shape = [size_hint(s) for s in node.meta["val"].shape]
    if shape[axis] != len(labels):
        raise Refused(f"'{node.name}' has {shape[axis]} features where {len(labels)} are made")
    return labels.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _in_runs(labels: Tensor, wanted: Tensor) -> bool:
    """Whether labels differ along one dimension only and are the wanted ones there, once, several times over, or each in a row."""
    for axis in range(labels.ndim):
        times, rest = divmod(labels.shape[axis], len(wanted))
        for run in (wanted.repeat(times), wanted.repeat_interleave(times)) if not rest else ():
            lines = labels.movedim(axis, -1)
            if torch.equal(lines, run.expand_as(lines)):
                return True
    return False
