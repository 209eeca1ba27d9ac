"""Fold: the scale and bias of a norm go into the linears that read it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import readers_of
from recast.passes.structures import Affine, affine_of
from recast.patterns.derivation import Derivation
from recast.patterns.sites import LinearSite, Use

__all__ = ["FoldNormScale"]


@dataclasses.dataclass(frozen=True)
class FoldNormScale(ExactPass):
    """``(n * g + h) W^T + b  ->  n (W diag(g))^T + (b + W h)``.

    A norm loses its scale and bias; so does any other value that is scaled or shifted by a constant vector on its way into
    linears only.
    """

    name: ClassVar[str] = "fold_norm_scale"

    def apply(self, edit: Edit) -> None:
        """Fold wherever all readers are linears whose matrices serve nothing else."""
        touched: set[str] = set()
        for node in list(edit.graph.nodes):
            affine = affine_of(node, edit)
            if affine is None or (affine.weight is None and affine.bias is None) or not node.users:
                continue
            if edit.product(node) is not None:
                continue  # a linear's own bias
            found = _readers(edit, affine)
            if isinstance(found, str):
                edit.refuse(node.name, found, node)
                continue
            if touched & {site.name for site, _ in found}:
                continue
            touched |= {site.name for site, _ in found}
            _fold(edit, affine, found)
            edit.did(f"{_weight_name(affine)} -> {', '.join(dict.fromkeys(site.name for site, _ in found))}")


def _weight_name(affine: Affine) -> str:
    vector = affine.weight or affine.bias
    return str(vector.target if vector is not None and vector.op == "get_attr" else affine.node.name)


def _readers(edit: Edit, affine: Affine) -> list[tuple[LinearSite, Use]] | str:
    """The linears that read a value, or why it cannot be folded into them."""
    for vector in (affine.weight, affine.bias):
        if vector is not None and edit.expression(vector) is None:
            return f"'{vector.name}' is computed from weights in a way that cannot be followed"
    found: list[tuple[LinearSite, Use]] = []
    for reader, value in readers_of(affine.node, casts=True):
        entered = edit.entered(reader, value)
        if reader.op == "output":
            return "the program gives it back as a result"
        if entered is None:
            return f"'{reader.name}' reads it, which is no linear over its last dimension"
        if reason := edit.plain(entered[1]):
            return f"'{entered[0].name}' reads it: {reason}"
        found.append(entered)
    for site, _ in found:
        if reason := edit.exclusive(site, tuple(use for s, use in found if s is site)):
            return f"'{site.name}' cannot take it: {reason}"
    return found


def _fold(edit: Edit, affine: Affine, found: list[tuple[LinearSite, Use]]) -> None:
    scale, shift = (None if v is None else _vector(edit.expression(v)) for v in (affine.weight, affine.bias))
    if scale is not None:
        scale = scale.shift(affine.offset)
    for site, use in found:
        matrix, bias = edit.matrix(use), edit.bias(use)
        if shift is not None:
            bias = (bias or Derivation.zeros(site.out_features)) + matrix @ shift
        with edit.graph.inserting_before(use.node):
            new = edit.linear(site, use, use.x, matrix if scale is None else matrix.scale_columns(scale), bias)
        edit.replace(use.node, new)
    with edit.graph.inserting_before(affine.node):
        bare = affine.bare(edit.graph)
    bare.meta.update({k: v for k, v in affine.node.meta.items() if k != "val" and bare is not affine.x})
    edit.replace(affine.node, bare)


def _vector(made: Derivation | None) -> Derivation:
    assert made is not None
    return made.reshape(made.shape[-1])
