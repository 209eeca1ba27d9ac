"""Fold: the diagonal in front of rewritten linears goes into whatever makes their input, as AWQ and SmoothQuant mean it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from recast.passes.errors_of import rounds
from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import keeps_features, origin_of, readers_of, sinks_of
from recast.passes.forms.operator import Operator
from recast.passes.forms.scaled import scaled_rows, without_scale
from recast.passes.module import OperatorModule
from recast.passes.structures import Core, affine_of, cores
from recast.patterns.derivation import Derivation
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import fixed_size, set_by_path

__all__ = ["FoldInputScale"]

aten = torch.ops.aten
_NOTHING = "'{}' makes it, which has no scale to change"


@dataclasses.dataclass(frozen=True)
class FoldInputScale(ExactPass):
    """``A (d * f(x))  ->  A f'(x)`` with f' the norm, linear or product that makes ``d * f``.

    All that reads the value must be rewritten linears with the same diagonal d in front. It goes into the scale and bias of a
    norm, into a vector that is multiplied with, into the rows and the bias of a linear (dense, or integers, whose scales take
    it), through an elementwise product into one of its factors, or through an attention into its values. Powers of two, which
    ``awq(shared=true)`` and ``smoothquant(shared=true)`` take, change no bit of the result unless numbers overflow.
    """

    name: ClassVar[str] = "fold_input_scale"
    requires: ClassVar[tuple[str, ...]] = ("forms applied",)

    def apply(self, edit: Edit) -> None:
        """Fold every diagonal that all readers of a value have in front."""
        calls: dict[str, list[fx.Node]] = {}
        for node in edit.graph.find_nodes(op="call_module"):
            calls.setdefault(str(node.target), []).append(node)
        seen: set[fx.Node] = set()
        touched: set[str] = set()
        for node in [node for nodes in calls.values() for node in nodes]:
            root = _source(node.args[0])
            if root in seen or without_scale(_operator(edit, node)) is None:
                continue
            seen.add(root)
            found = _common(edit, root, calls)
            if isinstance(found, str):
                edit.refuse(root.name, found, node)
                continue
            readers, scale = found
            paths = {str(reader.target) for reader in readers}
            names = ", ".join(sorted(_site(edit, path) for path in paths))
            change = _Maker(edit, calls, readers, scale, names)
            reason = change.take(root)
            if reason is not None:
                edit.refuse(root.name, reason, node)
                continue
            if touched & (paths | change.paths):
                continue  # an operator that is changed already waits for the next round
            touched |= paths | change.paths
            change.carry_out()
            for path in paths:
                taken = without_scale(_operator(edit, next(iter(calls[path]))))
                assert taken is not None
                _put(edit, path, taken[0])
            edit.did(f"{names} -> {change.into}")


def _source(node: Any) -> fx.Node:
    """What a value is before movements that leave features at their places."""
    while keeps_features(node):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _module(edit: Edit, path: str) -> OperatorModule | None:
    module = edit.program.module.get_submodule(path)
    return module if isinstance(module, OperatorModule) else None


def _operator(edit: Edit, node: fx.Node) -> Operator | None:
    module = _module(edit, str(node.target)) if node.op == "call_module" else None
    return None if module is None else module.operator


def _site(edit: Edit, path: str) -> str:
    module = _module(edit, path)
    return path if module is None else module.site


def _put(edit: Edit, path: str, operator: Operator) -> None:
    module = _module(edit, path)
    assert module is not None
    set_by_path(edit.program.module, path, OperatorModule(operator, module.site, module.form, module.order))


def _common(edit: Edit, root: fx.Node, calls: dict[str, list[fx.Node]]) -> tuple[list[fx.Node], Tensor] | str:
    """Everything that reads a value, and the diagonal that all of it has in front; or why there is none."""
    readers, scale = [], None
    for reader, value in readers_of(root):
        if reader.target is aten.sym_size.int:
            continue
        if reader.op == "output":
            return "the program gives it back as a result"
        taken = without_scale(_operator(edit, reader))
        if taken is None or reader.args[0] is not value or value in reader.args[1:]:
            return f"'{reader.name}' reads it without a scale of its own"
        if rounds(taken[0]) and not bool((torch.frexp(taken[1]).mantissa.abs() == 0.5).all()):
            return f"'{reader.name}' rounds its inputs, which a scale that is no power of two would change"
        if scale is not None and not torch.equal(scale, taken[1]):
            return f"'{reader.name}' reads it with another scale; with shared=true sites of one input get one"
        scale = taken[1]
        readers.append(reader)
    assert scale is not None  # one reader is known
    for reader in readers:
        if strays := [call for call in calls[str(reader.target)] if call not in readers]:
            return f"'{strays[0].name}' is a product with the same operator and reads something else"
    return readers, scale


@dataclasses.dataclass
class _Maker:
    """What makes a value and can take a scale over; looked at as a whole before anything is changed."""

    edit: Edit
    calls: dict[str, list[fx.Node]]
    readers: list[fx.Node]
    scale: Tensor
    names: str
    into: str = ""
    paths: set[str] = dataclasses.field(default_factory=set)
    node: fx.Node | None = None

    def take(self, node: fx.Node) -> str | None:
        """Find what takes the scale over; say why nothing does."""
        self.node = node
        affine = affine_of(node, self.edit)
        found = self.edit.product(node)
        if found is not None:
            site, use = found
            self.into = site.name
            return self.edit.plain(use) or self.edit.exclusive(site, (use,))
        if affine is not None and affine.kind != "shift":
            if affine.weight is None:
                return f"'{node.name}' has no scale"
            if affine.offset:
                return f"'{node.name}' adds {affine.offset:g} to its scale, which would be rounded anew"
            for vector in (affine.weight, affine.bias):
                if vector is not None and self.edit.expression(vector) is None:
                    return f"'{vector.name}' is computed from weights in a way that cannot be followed"
            self.into = _name_of(self.edit, affine.weight, node)
            return None
        if node.op == "call_module":
            path = str(node.target)
            operator = _operator(self.edit, node)
            if operator is None or scaled_rows(operator, self.scale) is None:
                return f"'{node.name}' holds its rows in a form that takes no scale"
            if len(self.calls[path]) > 1:
                return f"'{node.name}' is one of several products with the same operator"
            if len(node.args) > 1 and self.edit.expression(node.args[1]) is None:  # type: ignore[arg-type]
                return "its bias is computed from weights in a way that cannot be followed"
            self.into = _site(self.edit, path)
            self.paths.add(path)
            return None
        if node.target is aten.mul.Tensor and not node.kwargs:
            return self._factor(node)
        core = next((core for core in cores(self.edit) if core.node is origin_of(node)), None)
        return _NOTHING.format(node.name) if core is None else self._values(core)

    def _values(self, core: Core) -> str | None:
        """Behind an attention: the rows of the values, each of which is a feature of one head or of a group of heads."""
        start = origin_of(core.value)
        if self.edit.product(start) is None and start.op != "call_module":
            return f"'{start.name}' makes the values, which no linear does"
        if sum(arg is core.value for arg in core.node.args) > 1:
            return "values are keys, too"
        rows, elsewhere = None, set[int]()
        for sink in sinks_of(start):
            if sink.node.target is aten.sym_size.int:
                continue
            if sink.node is core.node and sink.value is core.value:
                rows = sink.index
            elif sink.value is not core.value:
                elsewhere |= set(torch.unique(sink.index).tolist())
            else:
                return f"'{sink.node.name}' reads the values, too"
        if rows is None or rows.ndim < 2 or bool((rows != rows[..., :1, :]).any()):
            return "features of the values do not stay apart"
        if elsewhere & set(torch.unique(rows).tolist()):
            return "the values are read elsewhere, too"
        rows = rows[..., :1, :]
        if core.groups > 1:
            rows = rows.repeat_interleave(core.groups, -3)
        shape = [size_hint(size) for size in core.node.meta["val"].shape]
        scale = torch.ones(size_hint(start.meta["val"].shape[-1]), dtype=self.scale.dtype, device=self.scale.device)
        for sink in sinks_of(core.node, rows.expand(shape).contiguous()):
            if sink.node.target is aten.sym_size.int:
                continue
            if sink.node not in self.readers:
                return f"'{sink.node.name}' reads it without a scale of its own"
            places = sink.index.reshape(-1, sink.index.shape[-1])
            if bool((places != places[0]).any()):
                return "features of the values do not stay apart"
            at = places[0].long()
            scale[at] = self.scale
            if not torch.equal(scale[at], self.scale):
                return "heads that share values have other scales"
        self.scale = scale
        return self.take(start)

    def _factor(self, node: fx.Node) -> str | None:
        reason = _NOTHING.format(node.name)
        size = len(self.scale)
        for operand in node.args[1::-1]:
            if not isinstance(operand, fx.Node) or operand in self.edit.constants:
                continue
            inner = _source(operand)
            value = inner.meta.get("val")
            if not isinstance(value, Tensor) or value.ndim == 0 or fixed_size(value.shape[-1]) != size:
                continue
            if {reader for reader, _ in readers_of(inner) if reader.target is not aten.sym_size.int} != {
                node
            } or node.args[0] is node.args[1]:
                reason = f"'{inner.name}' has other readers"
                continue
            failed = self.take(inner)
            if failed is None:
                return None
            reason = failed
        return reason

    def carry_out(self) -> None:
        """Change what `take` found."""
        edit, node = self.edit, self.node
        assert node is not None
        found = edit.product(node)
        if found is not None:
            site, use = found
            bias = edit.bias(use)
            with edit.graph.inserting_before(use.node):
                new = edit.linear(
                    site, use, use.x, self._times(edit.matrix(use)), None if bias is None else self._times(bias)
                )
            edit.replace(use.node, new)
            return
        if node.op == "call_module":
            operator = _operator(edit, node)
            module = _module(edit, str(node.target))
            assert operator is not None
            assert module is not None
            scale = self.scale
            if module.order is not None:
                scale = torch.empty_like(scale).index_copy_(0, module.order, scale)
            changed = scaled_rows(operator, scale)
            assert changed is not None
            _put(edit, str(node.target), changed)
            if len(node.args) > 1:
                self._vector(node, node.args[1])
            return
        affine = affine_of(node, edit)
        assert affine is not None
        self._vector(node, affine.weight)
        self._vector(node, affine.bias)

    def _times(self, made: Derivation) -> Derivation:
        """What a matrix or vector becomes, as a formula, its value noted."""
        value = made.value(self.edit.weights)
        scale = self.scale.to(value.device, torch.promote_types(value.dtype, torch.float32))
        scale = scale.reshape(-1, *[1] * (value.ndim - 1))
        changed = Derivation.fitted(f"rows scaled for {self.names}", made.shape, made)
        self.edit.values[changed] = value * scale
        return changed

    def _vector(self, node: fx.Node, vector: object) -> None:
        """Let an operation read a constant vector that was scaled."""
        if not isinstance(vector, fx.Node):
            return
        edit = self.edit
        made = edit.expression(vector)
        assert made is not None
        changed = self._times(made.reshape(made.shape[-1]))
        name = _name_of(edit, vector, node)
        own = all(reader is node for reader in edit.readers.get(name, {}))
        like = edit.values[changed].new_empty((), dtype=edit.constants.layout(vector).dtype)
        with edit.graph.inserting_before(node):
            new = edit.weight(name, changed, like, (name,) if own else ())
        node.replace_input_with(vector, new)


def _name_of(edit: Edit, vector: fx.Node, node: fx.Node) -> str:
    """The weight that a constant vector is made of, or where it is made of several, a name of its own."""
    sources = tuple(edit.constants.sources[vector])
    return str(sources[0]) if len(sources) == 1 else f"{node.name}.scale"
