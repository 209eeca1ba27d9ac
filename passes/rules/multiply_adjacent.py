"""Multiply: two linears in a row without anything between become one, where that is cheaper."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import readers_of, root_of
from recast.patterns.derivation import Derivation
from recast.patterns.sites import LinearSite, Use

__all__ = ["MultiplyAdjacent"]


@dataclasses.dataclass(frozen=True)
class MultiplyAdjacent(ExactPass):
    """``(x W1^T + b1) W2^T + b2  ->  x (W2 W1)^T + (W2 b1 + b2)``, if W2 W1 has no more elements than the two."""

    name: ClassVar[str] = "multiply_adjacent"

    def apply(self, edit: Edit) -> None:
        """Multiply every pair whose first result serves the second linear only."""
        touched: set[str] = set()
        for second in edit.sites:
            for use in second.uses:
                if edit.plain(use) is None:
                    _pair(edit, second, use, touched)


def _pair(edit: Edit, site: LinearSite, use: Use, touched: set[str]) -> None:
    product, start = use.product, root_of(use.x)
    found = edit.product(start)
    if found is None:
        return
    first, before = found
    what = f"{first.name} {site.name}"
    reason = edit.plain(before)
    if reason is None and (others := [r for r, _ in readers_of(start) if r is not product]):
        reason = f"'{others[0].name}' also reads '{first.name}'"
    reason = reason or edit.exclusive(site, (use,)) or edit.exclusive(first, (before,))
    if reason is not None:
        edit.refuse(what, reason, product)
        return
    kept, made = first.parameters + site.parameters, site.out_features * first.in_features
    if made > kept:
        edit.refuse(
            what,
            f"a bottleneck of {first.out_features}: the product would have {made} elements, the two have {kept}",
            product,
        )
        return
    if _lead(use.x) != _lead(before.x):
        edit.refuse(what, "the views between give the result other leading dimensions than the input has", product)
        return
    if touched & {first.name, site.name}:
        return
    touched |= {first.name, site.name}
    w1, w2, b1, b2 = edit.matrix(before), edit.matrix(use), edit.bias(before), edit.bias(use)
    bias = None
    if b1 is not None or b2 is not None:
        bias = (b2 or Derivation.zeros(site.out_features)) + (
            Derivation.zeros(site.out_features) if b1 is None else w2 @ b1
        )
    with edit.graph.inserting_before(use.node):
        new = edit.linear(site, use, before.x, w2 @ w1, bias)
    edit.replace(use.node, new)
    edit.did(f"{what} -> {site.name}")


def _lead(node: fx.Node) -> list[str]:
    return [str(s) for s in node.meta["val"].shape[:-1]]
