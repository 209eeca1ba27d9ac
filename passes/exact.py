"""What exact rewrites share: an `Edit` of a program that makes weights by formula, and `ExactPass`, which runs to a standstill."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from recast.passes.base import Context, Pass, Soundness
from recast.passes.dead import remove_dead
from recast.passes.meta import propagate
from recast.patterns.constants import Constants
from recast.patterns.derivation import Derivation
from recast.patterns.errors import RecastError
from recast.patterns.linear.find import find_linear
from recast.patterns.memo import remembered
from recast.patterns.program import Program, set_by_path
from recast.patterns.sites import LinearSite, Mismatch, Use, source_line

__all__ = ["Edit", "ExactPass", "Note", "call"]

aten = torch.ops.aten
_COPY, _UNTOUCHED = "copy to be changed", "untouched"  # what a program's memory is asked for
_ROUNDS = 200  # far beyond any chain of rewrites; a pass that undoes its own work would run for ever


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Insert an operation; it takes over where in the model's source another one stood."""
    node = graph.call_function(target, args, kwargs)
    if like is not None:
        node.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return node


@dataclasses.dataclass
class Note:
    """What an exact pass did, and where it saw its chance and had to let it pass."""

    done: list[str] = dataclasses.field(default_factory=list)
    refused: list[Mismatch] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"done": list(self.done), "refused": [m.to_dict() for m in self.refused]}


class Edit:
    """A copy of a program that is being changed, and what is known of it as it was.

    Everything known (`constants`, `sites`, `readers`) describes the program before the edit; nothing is looked at twice.

    Attributes
    ----------
    program, graph
        The copy.
    constants, sites
        Its constant values and linear sites.
    position
        Of each value in the graph.
    readers
        For each weight, the values that read it, or a constant made of it.
    values
        What formulas come to that weights alone do not tell; to be filled by passes that fit.
    """

    def __init__(self, program: Program, label: str) -> None:
        self.program, self.label = _copy_to_change(program), label
        self.graph = self.program.graph
        self.position = {node: i for i, node in enumerate(self.graph.nodes)}
        self.weights = dict(self.program.weights)
        self.constants = Constants(self.program)
        self.sites, _ = find_linear(self.program, self.constants)
        self.done: list[str] = []
        self.refused: dict[str, Mismatch] = {}
        self.drops: dict[str, str] = {}
        self._products: dict[fx.Node, list[tuple[LinearSite, Use]]] = {}
        for site in self.sites:
            for use in site.uses:
                for node in dict.fromkeys((use.node, use.product)):
                    self._products.setdefault(node, []).append((site, use))
        self.readers: dict[str, dict[fx.Node, None]] = {}
        for node in self.graph.nodes:
            if node not in self.constants:
                for operand in node.all_input_nodes:
                    for name in self.constants.sources.get(operand, ()):
                        self.readers.setdefault(name, {})[node] = None
        self.values: dict[Derivation, Tensor] = {}
        self._made: dict[str, set[fx.Node]] = {}
        self._named: dict[tuple[str, Derivation], str] = {}
        self._formulas: dict[str, Derivation] = {}
        self._origin = program
        self._replaced: dict[fx.Node, fx.Node] = {}

    # ------------------------------------------------------------------ telling

    def did(self, text: str) -> None:
        """Note a change."""
        self.done.append(text)

    def refuse(self, name: str, reason: str, node: fx.Node | None = None) -> None:
        """Note a place that looked right and is not; the first reason of a place is kept."""
        where, value = ("", "") if node is None else (source_line(node), node.name)
        self.refused.setdefault(name, Mismatch(name, self.label, 0, reason, value, where))

    def drop(self, name: str, why: str) -> None:
        """Note why a weight will not be needed any more."""
        for source in self.program.originals_of(name):
            self.drops[source] = why

    # ------------------------------------------------------------------ reading

    def product(self, node: Any) -> tuple[LinearSite, Use] | None:
        """The linear site that a value is the whole product of (bias added), and its use; None otherwise."""
        found = self._products.get(node, []) if isinstance(node, fx.Node) else []
        return found[0] if len(found) == 1 and found[0][1].node is node else None

    def entered(self, node: fx.Node, x: fx.Node) -> tuple[LinearSite, Use] | None:
        """The linear site whose product `node` is with `x` as the activation."""
        found = self._products.get(node, [])
        return found[0] if len(found) == 1 and found[0][1].product is node and found[0][1].x is x else None

    def plain(self, use: Use) -> str | None:
        """Why a use is not ``x W^T + b`` over the last dimension; None if it is."""
        c = use.contraction
        if use.index is not None or c.batch:
            return "it is one of several matrices multiplied at once"
        if use.addend is not None:
            return f"the product adds '{use.addend.name}', which is computed"
        if len(c.inputs) != 1 or len(c.outputs) != 1 or c.x != c.free + c.inputs or c.y != c.free + c.outputs:
            return "it is multiplied along other dimensions than the last one"
        if self.expression(use.weight) is None:
            return "its matrix is computed from weights in a way that cannot be followed"
        if use.bias is not None and self.expression(use.bias) is None:
            return "its bias is computed from weights in a way that cannot be followed"
        return None

    def exclusive(self, site: LinearSite, uses: tuple[Use, ...] | None = None) -> str | None:
        """Why a matrix may not be changed for some of its uses (all by default); None if it may."""
        uses = site.uses if uses is None else uses
        own = {use.product for use in uses}
        for name in site.weights:
            others = [n for n in self.readers.get(name, {}) if n not in own]
            if others:
                return f"its weight '{name}' is also read by '{others[0].name}'"
            if self.weights[name].untyped_storage().nbytes() == 0:
                return f"the storage of '{name}' was released"
            written = [n for _, kind, n in self.program.interface.mutations if kind == "weight" and n == name]
            if written:
                return f"the model writes to '{name}'"
        return None

    def expression(self, node: fx.Node) -> Derivation | None:
        """A constant of the graph as a formula over the program's weights; None if it is not one that can be followed."""
        if node not in self.constants:
            return None
        if node.op == "get_attr":
            return Derivation.weight(str(node.target), self.weights[str(node.target)].shape)
        source = self.expression(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return None
        shape = tuple(int(s) for s in self.constants.layout(node).shape)
        rank, args = len(source.shape), list[Any](node.args[1:])
        if node.target in (aten.t.default, aten.numpy_T.default):
            return source.permute(*reversed(range(rank)))
        if node.target is aten.transpose.int:
            order = list(range(rank))
            a, b = (int(d) % rank for d in args)
            order[a], order[b] = b, a
            return source.permute(*order)
        if node.target is aten.permute.default:
            return source.permute(*(int(d) % rank for d in args[0]))
        if node.target in _RESHAPES:
            return source.reshape(*shape)
        if node.target is aten.select.int:
            dim, index = int(args[0]) % rank, int(args[1])
            return source.select(dim, index % source.shape[dim])
        if node.target in (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default):
            return source
        if node.target in (aten._to_copy.default, aten.to.dtype):
            before, after = (self.constants.layout(n).dtype for n in (node.args[0], node))  # type: ignore[arg-type]
            wider = after.is_floating_point and torch.promote_types(before, after) == after
            return source if wider else source.cast(after)
        if len(args) == 1 and isinstance(args[0], int | float) and not node.kwargs and shape == source.shape:
            if node.target in (aten.mul.Tensor, aten.mul.Scalar):
                return source.scale(args[0])
            if node.target in (aten.add.Tensor, aten.add.Scalar):
                return source.shift(args[0])
        return None

    def matrix(self, use: Use) -> Derivation:
        """The matrix of a plain use, ``(out_features, in_features)``."""
        found = self.expression(use.weight)
        assert found is not None
        return found.reshape(*use.weight_shape).permute(*use.contraction.matrix_order())

    def bias(self, use: Use) -> Derivation | None:
        """The bias of a plain use, ``(out_features,)``."""
        return None if use.bias is None else self.expression(use.bias)

    # ------------------------------------------------------------------ changing

    def free_name(self, wanted: str, replaced: tuple[str, ...] = ()) -> str:
        """A name for a new weight: the one wanted, unless another weight has it that is not `replaced`."""
        taken = (set(self.weights) - set(replaced)) | set(self._made)
        name, count = wanted, 1
        while name in taken:
            name, count = f"{wanted}_{count}", count + 1
        return name

    def weight(self, wanted: str, made: Derivation, like: Tensor, replaced: tuple[str, ...] = ()) -> fx.Node:
        """Make a weight by formula over the program's weights, in the dtype of `like`, and insert its ``get_attr``."""
        whole = made.substitute(self.program.derived)
        if whole.op == "weight" and whole.options[0] not in self.weights:
            wanted = str(whole.options[0])  # an original one is back, under its own name
        if (name := self._named.get((wanted, made), "")) == "":  # a matrix used in several places is made once
            name = self._named[wanted, made] = self.free_name(wanted, replaced)
            value = self.values[made] if made in self.values else made.value(self.weights)
            value = value.to(device=like.device, dtype=like.dtype).contiguous()
            if any(value.data_ptr() == self.weights[source].data_ptr() for source in made.sources):
                value = value.clone()
            set_by_path(self.program.module, name, nn.Parameter(value, requires_grad=False))
            self._formulas[name] = whole
        node = self.graph.get_attr(name)
        self._made.setdefault(name, set()).add(node)
        return node

    def linear(
        self, site: LinearSite, use: Use, x: fx.Node, matrix: Derivation | None, bias: Derivation | None
    ) -> fx.Node:
        """Insert ``linear(x, matrix, bias)`` in place of a use whose weights are exclusively its own, under their names.

        ``matrix=None`` keeps the matrix as it is.
        """
        like = self.weights[site.weights[0]]
        dtype = torch.empty((), dtype=site.dtype, device=like.device)
        names = site.weights
        if matrix is None and use.product.target is aten.linear.default:
            w = use.weight
        else:
            w = self.weight(names[0], self.matrix(use) if matrix is None else matrix, dtype, names)
        b = None
        if bias is not None:
            old = self.constants.sources[use.bias] if use.bias is not None else ()
            own = {use.product, use.node}
            free = tuple(n for n in old if all(r in own for r in self.readers[n]))
            b = self.weight(free[0] if free else f"{site.name}.bias", bias, dtype, free)
        return call(self.graph, aten.linear.default, self.now(x), w, *(() if b is None else (b,)), like=use.product)

    def now(self, node: fx.Node) -> fx.Node:
        """What stands for a value of the program as it was."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that read one value read another, or what stands for that."""
        new = self.now(new)
        if new is not old:
            old.replace_all_uses_with(new)
            self._replaced[old] = new

    def finish(self) -> Program:
        """Clean up and give the changed program."""
        program = self.program
        self._origin.memory.pop(_COPY, None)  # it is no copy any more, and holds new weights
        remove_dead(self.graph)
        for node in self.graph.find_nodes(op="get_attr"):
            if node not in self._made.get(str(node.target), {node}):
                raise RecastError(
                    f"{self.label}: '{node.target}' was replaced by {self._formulas[str(node.target)]} while "
                    f"'{next(iter(node.users)).name}' still reads it; this is a defect of the pass"
                )
        held = program.weights
        program.derived = {n: d for n, d in (program.derived | self._formulas).items() if n in held}
        program.dropped |= {n: why for n, why in self.drops.items() if not program.successors_of(n)}
        propagate(program)
        self.graph.lint()
        return program.copy()  # holds what the graph reads and nothing else


def _copy_to_change(program: Program) -> Program:
    """A copy of a program: the one that an edit before left as it was, with what is known of it, or a new one.

    Most passes find nothing to do in most programs; copying, and finding linears again, takes longer than they do.
    """

    def made() -> tuple[Program, object]:
        copied = program.copy()
        return copied, remembered(copied, _UNTOUCHED, object)

    copied, mark = remembered(program, _COPY, made)
    if remembered(copied, _UNTOUCHED, object) is not mark:
        del program.memory[_COPY]
        copied, _ = remembered(program, _COPY, made)
    copied.aliases, copied.notes = dict(program.aliases), list(program.notes)
    copied.derived, copied.dropped = dict(program.derived), dict(program.dropped)
    return copied


_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


@dataclasses.dataclass(frozen=True)
class ExactPass(Pass):
    """A pass that keeps the function: `apply` makes an edit, and is called again until there is nothing left to do."""

    soundness: ClassVar[Soundness] = Soundness.EXACT

    @abc.abstractmethod
    def apply(self, edit: Edit) -> None:
        """Find places in the program as it is and change them; places that share a weight or a value wait for the next call."""

    def run(self, program: Program, context: Context) -> Program:
        """Apply until a call does nothing."""
        note = Note()
        current = program
        for _ in range(_ROUNDS):
            edit = Edit(current, self.name)
            self.apply(edit)
            note.refused = list(edit.refused.values())
            if not edit.done:
                context.notes[str(self)] = note
                return program.copy() if current is program else current
            note.done += edit.done
            current = edit.finish()
        raise RecastError(
            f"{self.name}: still changing {current.label} after {_ROUNDS} rounds; this is a defect of the pass"
        )
