"""`find` and `coverage`: the sites of a program, what share of it they are, and why everything else is none."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.capture.onnx.kept import DONE, described, is_kept
from recast.patterns.constants import Constants
from recast.patterns.errors import ModelError, RecastError, nearest
from recast.patterns.linear.find import find_linear, is_product, product_flops
from recast.patterns.linear.spellings import is_matrix
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.rules import rules
from recast.patterns.sites import LinearSite, Mismatch, Site, source_line

__all__ = ["Coverage", "coverage", "find"]

aten = torch.ops.aten

_LOOKUPS = {
    aten.embedding.default: "looked up by row (an embedding), not multiplied",
    aten.index.Tensor: "looked up by index, not multiplied",
    aten.index_select.default: "looked up by index, not multiplied",
    aten.gather.default: "looked up by index, not multiplied",
}
_JOINED = {aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}


def find(program: Program, kind: str | None = None) -> list[Site]:
    """Every place of a program worth rewriting: linear sites in graph order, then what they are part of, kind by kind.

    Parameters
    ----------
    program
        Where to look.
    kind
        Only sites of this kind: ``linear``, ``norm``, ``rotary``, ``attention``, ``moe``, ``mlp``, ``embedding``.

    Raises
    ------
    RecastError
        There is no such kind, or what was given is no program.

    Examples
    --------
    >>> import torch
    >>> from recast.patterns.capture.export import capture
    >>> program = capture(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), (torch.randn(3, 8),))
    >>> [(site.kind, site.name, site.shape) for site in find(program)]
    [('linear', '0', (4, 8))]
    """
    _check(program, "find")
    if kind == "linear":
        return list(find_linear(program)[0])
    kinds = {"linear", *(rule.kind for rule in rules())}
    if kind is not None and kind not in kinds:
        raise RecastError(f"find: there is no kind of site {kind!r}; {nearest(kind, kinds)}")
    return [site for site in recognise(program).sites if kind in (None, site.kind)]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What share of a program's matrices was matched, and every miss with its reason.

    Parameters
    ----------
    parameters_total, parameters_matched
        Elements of all matrices that the model multiplies by (tables that are only looked up or added are listed among the
        misses but not counted), and of those that belong to a site.
    flops_total, flops_matched
        Floating point operations of all matrix products at the captured example's shapes, and of those at sites.
    sites
        Sites found.
    misses
        Everything else that is a matrix or a product, with the reason.
    """

    parameters_total: int
    parameters_matched: int
    flops_total: int
    flops_matched: int
    sites: tuple[Site, ...]
    misses: tuple[Mismatch, ...]

    @property
    def fraction(self) -> float:
        """Matched share of the matrix parameters; 1 for a model without matrices."""
        return self.parameters_matched / self.parameters_total if self.parameters_total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form (see the design's interface)."""
        kinds: dict[str, int] = {"linear": 0, "attention": 0, "moe": 0, "norm": 0}
        for site in self.sites:
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
        return {
            "parameters": {"total": self.parameters_total, "matched": self.parameters_matched},
            "flops": {"total": self.flops_total, "matched": self.flops_matched},
            "sites": kinds,
            "misses": [miss.to_dict() for miss in self.misses],
        }

    def __str__(self) -> str:
        lines = [
            (
                f"{len(self.sites)} sites; parameters {self.parameters_matched:,} of {self.parameters_total:,} "
                f"({self.fraction:.1%}); FLOPs {self.flops_matched:,} of {self.flops_total:,}"
            )
        ]
        lines += [f"  miss {m.name} ({m.kind}, {m.parameters:,} parameters): {m.reason}" for m in self.misses]
        return "\n".join(lines)


def coverage(program: Program) -> Coverage:
    """Measure how much of a program `find` reaches; see `Coverage`."""
    _check(program, "coverage")
    constants = Constants(program)
    recognition = recognise(program, constants)
    sites = [site for site in recognition.sites if isinstance(site, LinearSite)]
    mismatches = recognition.misses
    weights = constants.weights
    matched = {name for site in sites for name in site.weights}
    misses = list(mismatches)
    if any(is_kept(node) for node in program.graph.nodes):
        named = {node.name: node for node in program.graph.nodes}
        misses = [_told(miss, named, constants) for miss in mismatches] + _left(program, constants)
    counted = {m.name for m in misses if m.parameters}
    total = sum(weights[name].numel() for name in matched | counted if is_matrix(weights[name]) or name in matched)
    users = _users(program, constants)
    # The weight of a norm over several dimensions, or over each head, has the shape of a matrix and multiplies nothing.
    elementwise = {name for site in recognition.sites if site.kind in ("embedding", "norm") for name in site.weights}
    for name, weight in weights.items():
        if name in matched or name in counted or name in elementwise or not is_matrix(weight):
            continue
        if (read := users.get(name)) and all(is_kept(node) for node in read):
            continue  # those are misses themselves
        miss, multiplied = _other_use(name, users.get(name, []), program, constants)
        misses.append(miss)
        total += weight.numel() if multiplied else 0
    rests = sum(m.parameters for m in mismatches if m.kind == "rest")
    owned = sum(weights[name].numel() for name in matched) - rests
    flops = sum(product_flops(node) for node in program.graph.nodes if node not in constants)
    return Coverage(total, owned, flops, sum(site.flops for site in sites), recognition.sites, tuple(misses))


def _left(program: Program, constants: Constants) -> list[Mismatch]:
    """ONNX operators that stay as they are, those that read a matrix or that nothing here knows."""
    found = []
    for node in program.graph.nodes:
        if not is_kept(node):
            continue
        operator, reason = described(node)
        held = [n for n in node.all_input_nodes if n in constants and n.meta["val"].ndim > 1]
        if held or reason != DONE:
            name = constants.sources[held[0]][0] if held else node.name
            said = f"the ONNX operator {operator} is left as it is: {reason}"
            found.append(Mismatch(name, "kept", 0, said, node.name, source_line(node)))
    return found


def _told(miss: Mismatch, named: dict[str, fx.Node], constants: Constants) -> Mismatch:
    """The same, with the reason why an operand is computed if it is a matrix that is quantized already."""
    node = named.get(miss.node) if miss.kind == "product" else None
    for operand in node.all_input_nodes if node is not None else ():
        while operand.op == "call_function" and len(operand.all_input_nodes) == 1 and not is_kept(operand):
            (operand,) = operand.all_input_nodes
        if is_kept(operand) and all(n in constants for n in operand.all_input_nodes) and described(operand)[1] == DONE:
            return dataclasses.replace(miss, reason=f"its matrix comes from {described(operand)[0]}: {DONE}")
    return miss


def _check(program: object, what: str) -> None:
    if not isinstance(program, Program):
        raise ModelError(
            f"{what}: a Program is needed, {type(program).__name__} was given; recast.capture(model, (inputs,)) makes one"
        )


def _users(program: Program, constants: Constants) -> dict[str, list[fx.Node]]:
    """Computed values that read each weight, directly or through a constant made of it."""
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in constants:
            for name in {w for n in node.all_input_nodes for w in constants.sources.get(n, ())}:
                users.setdefault(name, []).append(node)
    return users


def _met(users: list[fx.Node], constants: Constants) -> list[fx.Node]:
    """Where a weight meets activations: behind slices by computed sizes, casts and comparisons, which are made of it alone."""
    own: set[fx.Node] = set()
    met: dict[fx.Node, None] = {}
    queue = deque(users)
    while queue:
        node = queue.popleft()
        if node in own or node in met:
            continue
        read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if node.op == "call_function" and not is_product(node) and all(n in own or n in constants for n in read):
            own.add(node)
            queue.extend(node.users)
        elif node.op != "output":
            met[node] = None
    return list(met) or users


def _elementwise(target: Any) -> bool:
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return True
    if target in (aten.mul.Tensor, aten.div.Tensor):  # and then summed, that would be a matrix product
        return False
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _other_use(name: str, users: list[fx.Node], program: Program, constants: Constants) -> tuple[Mismatch, bool]:
    """Say what a matrix that no product touches is used for, and whether that counts as multiplying."""
    users = _met(users, constants)
    kinds = {node.target for node in users}
    numel = constants.weights[name].numel()
    node = users[0] if users else None
    where, label = (source_line(node), node.name) if node else ("", "")
    if kinds and kinds <= set(_LOOKUPS) and constants.weights[name].ndim < 3:  # of stacks, whole matrices are looked up
        reason = next(_LOOKUPS[kind] for kind in _LOOKUPS if kind in kinds)
        return Mismatch(name, "embedding", numel, reason, label, where), False
    # Of a stack, whole matrices are looked up: somewhere a product follows.
    taken_out = constants.weights[name].ndim >= 3 and bool(kinds & set(_LOOKUPS))
    if kinds and not taken_out and kinds <= _JOINED | set(_LOOKUPS):
        return Mismatch(
            name, "table", numel, "added to or joined with activations, not multiplied", label, where
        ), False
    if kinds and not taken_out and all(kind in _JOINED or kind in _LOOKUPS or _elementwise(kind) for kind in kinds):
        done = ", ".join(sorted({str(getattr(k, "_opname", k)) for k in kinds}))
        reason = f"combined with activations value by value ({done}), not multiplied as a matrix"
        return Mismatch(name, "table", numel, reason, label, where), False
    if not users:
        written = [i for i, kind, n in program.interface.mutations if n == name]
        reason = "written by the model (a cache), not constant" if written else "not used to compute the outputs"
        return Mismatch(name, "buffer", numel, reason), False
    names = ", ".join(sorted({str(k) for k in kinds}))
    return Mismatch(
        name, "other", numel, f"used by {names}, which is not a matrix product known here", label, where
    ), True
