"""What stands next to a product in the graph becomes part of its operation, where that can take it.

Inductor fuses neighbours with products of its own only: beside a custom operation they are a pass over memory and a launch. An
operation of recast takes those for which its schema has arguments: ``bias``, ``activation``, ``factor``, ``residual``; and ``gated``,
where two products of one vector, ``f(x Gᵀ) * (x Uᵀ)``, can be one (`pairs`). Nothing here names an operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.activations import activation_after
from recast.lowering.pairs import as_one, given, numbered
from recast.passes.dead import remove_dead
from recast.patterns.program import Program

__all__ = ["fuse_neighbours"]

aten = torch.ops.aten
_STAGES = ("bias", "activation", "factor", "residual")  # in the order in which an operation does them
# A stage cannot follow these; a bias may be added after a residual as well as before it.
_TOO_LATE = {
    "bias": ("bias", "activation", "factor"),
    "activation": ("activation", "factor", "residual"),
    "factor": ("factor", "residual"),
    "residual": ("residual",),
}
_ADD, _MULTIPLY = aten.add.Tensor, aten.mul.Tensor
_SAID = {"add", "mul", "gelu", "relu", "silu", "sigmoid", "tanh"}


@dataclass
class _Fused:
    """A product and what it takes.

    Attributes
    ----------
    node, last
        The product; what it and its neighbours make.
    taken
        Arguments of the operation, by name.
    names
        What was taken, in words.
    left
        Why the next neighbour is not, in words.
    """

    node: fx.Node
    last: fx.Node
    taken: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    left: str = ""


def fuse_neighbours(
    program: Program, kernels: Mapping[str, str], paired: Mapping[Any, Mapping[str, int]]
) -> dict[str, str]:
    """Fuse the neighbours of every product of a program without operator nodes.

    Parameters
    ----------
    program
        Changed in place.
    kernels
        The kernel of each site.
    paired
        For each operation that can run two products at once: along which dimension each of its tensors has a weight's rows.

    Returns
    -------
    The kernel of each site, with what it took, and in brackets what it did not take and why.
    """
    graph = program.graph
    said: dict[str, dict[str, None]] = {}
    if paired:
        _gates(program, paired, said)
    for node in list(graph.nodes):
        if _can(node):
            fused = _follow(node)
            _say(said, node, fused.names, fused.left)
            if fused.taken:
                _put(graph, fused)
    remove_dead(graph)
    graph.lint()
    program.module.recompile()
    return {site: kernel + "".join(said.get(site, ())) for site, kernel in kernels.items()}


def _say(said: dict[str, dict[str, None]], node: fx.Node, names: list[str], left: str) -> None:
    text = "".join(f" + {name}" for name in names) + (f" ({left})" if left else "")
    if text:
        said.setdefault(str(node.meta.get("recast_site", "")), {})[text] = None


def _can(node: fx.Node) -> set[str]:
    """Which of the stages a call can do: none unless it is an operation of recast."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "recast":
        return set()
    return {argument.name for argument in target._schema.arguments} & {*_STAGES}


def _follow(node: fx.Node, most: int = len(_STAGES)) -> _Fused:
    """Take neighbours of the first so many stages, as long as there is one that the operation can do."""
    fused, can, have = _Fused(node, node), _can(node), given(node)
    done = [name for name in _STAGES if have.get(name) not in (None, "")] + ["activation"] * bool(have.get("gated"))
    while True:
        step = _next(fused.last)
        own = all(
            _site(reader) == _site(node) != "" for reader in fused.last.users
        )  # the site's operator, not its model
        if isinstance(step, str) and "residual" not in done and not own:
            fused.left = step
        if not isinstance(step, _Step) or _STAGES.index(step.stage) >= most:
            return fused
        if step.stage not in can:
            fused.left = "" if own else f"{step.name} apart: this kernel does none"
            return fused
        late = [name for name in done if name in _TOO_LATE[step.stage]]
        if late:
            fused.left = f"{step.name} apart: it comes after {late[-1]}"
            return fused
        done.append(step.stage)
        fused.taken[step.stage], fused.last = step.value, step.last
        # Parts of a sum of forms, or what the model adds.
        fused.names.append(
            "sum" if step.stage == "residual" and own and _site(step.value) == _site(node) else step.name
        )


def _site(node: fx.Node) -> str:
    return str(node.meta.get("recast_site", ""))


@dataclass
class _Step:
    """A neighbour: which stage it is, with what, its name, and the node that has its result."""

    stage: str
    value: Any
    name: str
    last: fx.Node


def _next(value: fx.Node) -> _Step | str | None:
    """The neighbour that reads a value, why it cannot be taken, or None where what reads it is no neighbour."""
    while len(value.users) == 1:  # casts that change nothing
        reader = next(iter(value.users))
        if reader.target is not aten.to.dtype or not _alike(value, reader):
            break
        value = reader
    found = activation_after(value)
    if found is not None:
        if not _alike(value, found[1]):
            return f"{found[0]} apart: its dtype is another"
        return _Step("activation", found[0], found[0], found[1])
    readers = list(value.users)
    kinds = [str(getattr(reader.target, "_opname", "")) for reader in readers]
    if len(readers) > 1:
        kind = next((kind for kind in kinds if kind in _SAID), "")
        return f"{kind} apart: {len(readers)} read what comes before it" if kind else None
    if not readers:
        return None
    reader = readers[0]
    if reader.target not in (_ADD, _MULTIPLY) or reader.kwargs.get("alpha", 1) != 1:
        return None
    others = [argument for argument in reader.args[:2] if argument is not value]
    other = others[0] if others else None
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), Tensor):
        return None
    name = "bias" if other.meta["val"].dim() == 1 else "residual" if reader.target is _ADD else "factor"
    if not _alike(value, reader) or other.meta["val"].dtype != value.meta["val"].dtype:
        same = other.meta["val"].dtype == value.meta["val"].dtype
        return f"{name} apart: its {'shape' if same else 'dtype'} is another"
    if _sizes(other) == _sizes(value):
        name = "residual" if reader.target is _ADD else "factor"
        return _Step(name, other, name, reader)
    if reader.target is _ADD and _sizes(other) == _sizes(value)[-1:]:
        return _Step("bias", other, "bias", reader)
    return f"{name} apart: its shape is another"


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether values have the same shape, dtype and device."""
    a, b = one.meta["val"], other.meta["val"]
    return _sizes(one) == _sizes(other) and (a.dtype, a.device) == (b.dtype, b.device)


def _put(graph: fx.Graph, fused: _Fused) -> fx.Node:
    """Call the operation with what it takes, in the place of the last neighbour: there everything that it reads is known."""
    node, last = fused.node, fused.last
    arguments = {**given(node), **fused.taken}
    with graph.inserting_before(last):
        new = graph.call_function(node.target, tuple(arguments.values()))  # type: ignore[arg-type]
    new.meta = {**node.meta, "val": last.meta["val"]}
    last.replace_all_uses_with(new)
    _erase(graph, last)
    return new


def _erase(graph: fx.Graph, last: fx.Node) -> None:
    """Remove what nothing reads any more, from a node back: it would count as a reader of what is left."""
    dead, gone = [last], set[fx.Node]()
    while dead:
        node = dead.pop()
        if node.op in ("call_function", "get_attr") and not node.users and node not in gone:
            gone.add(node)
            dead += node.all_input_nodes
            graph.erase_node(node)


def _gates(program: Program, paired: Mapping[Any, Mapping[str, int]], said: dict[str, dict[str, None]]) -> None:
    """Make one product of a gate and what it gates, where both are laid out alike."""
    graph, alike = program.graph, numbered(program.graph)
    used = Counter(str(node.target) for node in graph.find_nodes(op="get_attr"))
    chains = {chain.last: chain for node in graph.nodes if node.target in paired for chain in [_follow(node, most=2)]}
    for node in [n for n in graph.nodes if n.target is _MULTIPLY]:
        sides = [chains[a] for a in node.args[:2] if a in chains and list(chains[a].node.users)]
        if len(sides) != 2 or sides[0] is sides[1] or any(list(side.last.users) != [node] for side in sides):
            continue
        gate, up = sides if "activation" in sides[0].taken else sides[::-1]
        if "activation" in up.taken or gate.node.target is not up.node.target:
            continue
        rows = paired[gate.node.target]
        biases = gate.taken.get("bias"), up.taken.get("bias")
        found = as_one(program, node, (gate.node, up.node), biases, rows, alike, used)
        if isinstance(found, str):
            _say(said, gate.node, [], f"not one product with '{_site(up.node)}': {found}")
            continue
        activation = gate.taken.get("activation", "")
        new = _put(graph, _Fused(found, node, {"activation": activation}))
        graph.erase_node(found)
        names = ["bias"] * (biases != (None, None)) + [activation] * bool(activation)
        _say(said, new, [*names, f"gate of '{_site(up.node)}'"], "")
        _say(said, up.node, [], f"one product with '{_site(gate.node)}'")
