"""Drop what softmax cancels: the bias of keys; and move the bias of values, whose weights sum to one, behind the attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from recast.passes.exact import Edit, ExactPass
from recast.passes.follow import Sink, origin_of, ranges_of, sinks_of
from recast.passes.structures import Core, cores
from recast.patterns.derivation import Derivation
from recast.patterns.linear.packing import size_hint
from recast.patterns.sites import LinearSite, Use

__all__ = ["DropSoftmaxConstant"]


@dataclasses.dataclass(frozen=True)
class DropSoftmaxConstant(ExactPass):
    """``softmax(q (k + b)^T) = softmax(q k^T + const)``, and ``P (v + b) W_O^T = P v W_O^T + W_O b`` as rows of P sum to one.

    Parameters
    ----------
    full_rows
        Assume that no query has all its keys masked, so that rows of P sum to one under any mask.
    """

    name: ClassVar[str] = "drop_softmax_constant"
    full_rows: bool = False

    def apply(self, edit: Edit) -> None:
        """Look at keys and values of every attention."""
        touched: set[str] = set()
        found = cores(edit)
        for core in found:
            self._keys(edit, core, found, touched)
            self._values(edit, core, touched)

    def _keys(self, edit: Edit, core: Core, found: list[Core], touched: set[str]) -> None:
        biased = _biased(edit, core.key, "keys", core.node)
        if biased is None:
            return None
        site, use, bias = biased
        ends = sinks_of(use.node)
        mine = [s for s in ends if any(c.key_reader is s.node and c.key is s.value for c in found)]
        if any(not _same_for_all(s.index, core.key_axis) for s in mine):
            return edit.refuse(site.name, "its features are rearranged among tokens before the scores", core.node)
        rows = _rows(mine)
        if not rows or _zero(edit, bias, rows):
            return None
        others = [s for s in ends if s not in mine and rows & _rows([s])]
        if others:
            return edit.refuse(site.name, f"'{others[0].node.name}' reads its keys before the scores do", core.node)
        return _without_bias(edit, site, use, bias, rows, touched, f"{site.name}: bias of the keys dropped")

    def _values(self, edit: Edit, core: Core, touched: set[str]) -> None:
        biased = _biased(edit, core.value, "values", core.node)
        if biased is None:
            return None
        site, use, bias = biased
        ends = sinks_of(use.node)
        mine = [s for s in ends if s.value is core.value and _takes_value(s.node, core)]
        rows = _rows(mine)
        if not rows or _zero(edit, bias, rows):
            return None
        others = [s for s in ends if s not in mine and rows & _rows([s])]
        if others:
            return edit.refuse(site.name, f"'{others[0].node.name}' reads its values too", core.node)
        if core.zero_rows and not self.full_rows:
            return edit.refuse(
                site.name, f"{core.zero_rows}; drop_softmax_constant{{full_rows=True}} assumes there is none", core.node
            )
        target = _behind(edit, core, mine[0])
        if isinstance(target, str):
            return edit.refuse(site.name, target, core.node)
        taker, taking, order = target
        if touched & {site.name, taker.name} or site.name == taker.name:
            return None
        if reason := edit.exclusive(site, (use,)):
            return edit.refuse(site.name, reason, core.node)
        touched.add(taker.name)
        moved = edit.matrix(taking) @ Derivation.cat(*(bias.rows(span) for span in order))
        with edit.graph.inserting_before(taking.node):
            old = edit.bias(taking)
            new = edit.linear(taker, taking, taking.x, None, moved if old is None else old + moved)
        edit.replace(taking.node, new)
        return _without_bias(edit, site, use, bias, rows, touched, f"{site.name}: bias of the values -> {taker.name}")


def _biased(edit: Edit, value: fx.Node, what: str, node: fx.Node) -> tuple[LinearSite, Use, Derivation] | None:
    """The linear with bias that keys or values come from by movement alone."""
    start = origin_of(value)
    found = edit.product(start)
    if found is None:
        if _made_by_linear(edit, start):
            edit.refuse(f"{node.name}.{what}", f"'{start.name}' stands between them and their linear", start)
        return None
    site, use = found
    bias = edit.bias(use) if use.bias is not None and edit.plain(use) is None else None
    return None if bias is None else (site, use, bias)


def _made_by_linear(edit: Edit, start: fx.Node) -> bool:
    """Whether a linear with a bias is found a few steps back, as behind a rotary embedding or a norm."""
    todo, seen = [start], {start}
    while todo and len(seen) < 40:
        for operand in todo.pop().all_input_nodes:
            found = edit.product(operand)
            if found is not None:
                if found[1].bias is not None:
                    return True
            elif operand not in seen and operand.op == "call_function":
                seen.add(operand)
                todo.append(operand)
    return False


def _rows(sinks: list[Sink]) -> set[int]:
    return {int(row) for sink in sinks for row in torch.unique(sink.index).tolist()}


def _same_for_all(index: Tensor, axis: int) -> bool:
    first = index.narrow(axis, 0, 1)
    return bool((index == first).all())


def _takes_value(node: fx.Node, core: Core) -> bool:
    return node is core.node


def _zero(edit: Edit, bias: Derivation, rows: set[int]) -> bool:
    """Whether these elements were dropped before."""
    whole = bias.substitute(edit.program.derived)
    return all(whole.rows(span).op == "zeros" for span in ranges_of(rows))


def _without_bias(
    edit: Edit, site: LinearSite, use: Use, bias: Derivation, rows: set[int], touched: set[str], text: str
) -> None:
    """Put zeros for some elements of a bias, or leave it out where none is left."""
    if site.name in touched:
        return
    if reason := edit.exclusive(site, (use,)):
        edit.refuse(site.name, reason, use.node)
        return
    touched.add(site.name)
    pieces, at = [], 0
    for start, stop in ranges_of(rows):
        if at < start:
            pieces.append(bias.rows((at, start)))
        pieces.append(Derivation.zeros(stop - start))
        at = stop
    if at < bias.shape[0]:
        pieces.append(bias.rows((at, bias.shape[0])))
    left = Derivation.cat(*pieces)
    whole = left.substitute(edit.program.derived)
    with edit.graph.inserting_before(use.node):
        new = edit.linear(site, use, use.x, None, None if whole.op == "zeros" else left)
    edit.replace(use.node, new)
    if whole.op == "zeros":
        for name in bias.sources:
            edit.drop(name, text)
    edit.did(text)


def _behind(edit: Edit, core: Core, sink: Sink) -> tuple[LinearSite, Use, list[tuple[int, int]]] | str:
    """The linear that takes the attention's result, and in which order it sees the features of the values' bias."""
    index = sink.index
    if not _same_for_all(index, -2):
        return "its features are rearranged among tokens before the attention"
    shape = [size_hint(s) for s in core.node.meta["val"].shape]
    index = index.narrow(-2, 0, 1)
    if core.groups > 1:
        index = index.repeat_interleave(core.groups, -3)
    ends = sinks_of(core.node, index.expand(shape).contiguous())
    found = [edit.entered(s.node, s.value) for s in ends]
    if len(ends) != 1 or found[0] is None:
        other = next((s.node.name for s, f in zip(ends, found, strict=True) if f is None), "several linears")
        return f"'{other}' reads the attention's result, which is no linear that could take the bias"
    site, use = found[0]
    if reason := edit.plain(use) or edit.exclusive(site, (use,)):
        return f"'{site.name}' cannot take the bias: {reason}"
    order = ends[0].index.flatten(0, -2)
    if not _same_for_all(order, 0):
        return "the attention's features are rearranged among tokens before the next linear"
    spans: list[tuple[int, int]] = []
    for row in order[0].tolist():
        if spans and spans[-1][1] == row:
            spans[-1] = (spans[-1][0], row + 1)
        else:
            spans.append((row, row + 1))
    return site, use, spans
