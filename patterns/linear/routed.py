"""Products with experts: which matrix of a weight a row meets is computed by the model (`bmm(w[ids], x)`, `grouped_mm`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from recast.patterns.constants import Constants
from recast.patterns.contraction import Contraction
from recast.patterns.sites import Routing, Use

__all__ = ["gathered", "grouped", "is_grouped"]

aten = torch.ops.aten

# Custom operations are known by name: the library that defines them may not be there.
_GROUPED = frozenset({"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"})
_COPIES = {aten.clone.default, aten.contiguous.default}
_FOLLOWED = _COPIES | {aten.transpose.int, aten.permute.default, aten.unsqueeze.default}
_NAMED = {
    aten.view.default,
    aten.reshape.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.squeeze.dim,
    aten.mul.Tensor,
}

Dim = tuple[str, int]  # ("row", k): dimension k of the numbers; ("weight", k): of the weight; ("one", 0): of size 1


# What was answered for an operation, which is kept so that no other takes its identity: it is asked of every node, and torch
# spells and hashes operations in Python.
_known: dict[int, tuple[Any, bool]] = {}


def is_grouped(target: Any) -> bool:
    """Whether an operation multiplies runs of rows by a matrix each."""
    found = _known.get(id(target))
    if found is None or found[0] is not target:
        found = _known[id(target)] = (target, isinstance(target, torch._ops.OpOverload) and str(target) in _GROUPED)
    return found[1]


def grouped(node: fx.Node, constants: Constants) -> Use | str:
    """Read ``grouped_mm(x, w, ends)``: rows up to ``ends[0]`` meet ``w[0]``, from there to ``ends[1]`` meet ``w[1]`` ..."""
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)  # type: ignore[union-attr]
    x: Any = given.get("self", given.get("input"))
    weight: Any = given.get("mat2", given.get("weight"))
    ends: Any = given.get("offs")
    if weight not in constants:
        return "the experts' weights are computed, not constant"
    if x in constants or x.meta["val"].ndim != 2 or weight.meta["val"].ndim != 3 or ends is None:
        return "this grouped product is not one of rows of a matrix with a stack of matrices"
    if given.get("bias") is not None or given.get("out_dtype") not in (None, x.meta["val"].dtype):
        return "this grouped product adds a bias or gives another dtype"
    count, *shape = weight.meta["val"].shape
    if not all(isinstance(s, int) for s in (count, *shape)):
        return "the weight's shape depends on the input"
    routing = Routing("grouped", ends, "r", "rz", count)
    return Use(node, node, x, weight, Contraction("ry", "yz", "rz"), weight_shape=tuple(shape), routing=routing)


@dataclasses.dataclass(frozen=True)
class _Gather:
    weight: fx.Node
    index: fx.Node
    dims: tuple[Dim, ...]
    nodes: tuple[fx.Node, ...]


def gathered(
    node: fx.Node, x: Any, operand: Any, letters: tuple[str, str, str], constants: Constants
) -> Use | str | None:
    """Read a product with matrices looked up by number, ``w[ids]``; None if the operand is none."""
    gather = _gather(operand, constants)
    if gather is None or isinstance(gather, str):
        return gather
    a, w, y = letters
    held = gather.weight.meta["val"].shape
    if not isinstance(x, fx.Node) or len(gather.dims) != len(w) or not all(isinstance(s, int) for s in held):
        return "the weight's shape depends on the input"
    rows = {k: d for d, (kind, k) in zip(w, gather.dims, strict=True) if kind == "row"}
    inside = {k: d for d, (kind, k) in zip(w, gather.dims, strict=True) if kind == "weight"}
    if any(d not in y for d in rows.values()):
        return "the product sums over the rows that choose an expert"
    matrix = "".join(inside[k] for k in sorted(inside))
    if any(d in a and d in y for d in matrix):
        return "each expert is itself a stack of matrices"
    if any(d not in a and d not in matrix and d not in rows.values() for d in y):
        return "a dimension of the weight carries nothing"
    one = Contraction(a, matrix, "".join(d for d in y if d in a or d in matrix))
    routing = Routing(
        "gathered", gather.index, "".join(rows[k] for k in sorted(rows)), y, int(held[0]), nodes=gather.nodes
    )
    return Use(node, node, x, gather.weight, one, weight_shape=tuple(held[1:]), routing=routing)


def _gather(operand: Any, constants: Constants) -> _Gather | str | None:
    chain: list[fx.Node] = []
    node = operand
    while isinstance(node, fx.Node) and node.op == "call_function" and node not in constants and len(chain) < 8:
        chain.append(node)
        if (found := _looked_up(node, constants)) is not None:
            weight, index = found
            break
        if node.target not in _FOLLOWED | _NAMED:
            return None
        node = node.args[0]
    else:
        return None
    ranks = index.meta["val"].ndim, weight.meta["val"].ndim
    dims: list[Dim] = [("row", k) for k in range(ranks[0])] + [("weight", k) for k in range(1, ranks[1])]
    for step in reversed(chain[:-1]):
        following = _through(step, dims)
        if following is None:
            kind = getattr(step.target, "_opname", step.target)
            return f"the experts' matrices, once looked up, pass through '{kind}', which is not followed"
        dims = following
    return _Gather(weight, index, tuple(dims), tuple(reversed(chain)))


def _looked_up(node: fx.Node, constants: Constants) -> tuple[fx.Node, fx.Node] | None:
    """The weight and the numbers of ``weight[ids]``."""
    weight: Any = node.args[0] if node.args else None
    index: Any = None
    if node.target is aten.index.Tensor:
        numbers: Any = node.args[1]
        index = numbers[0] if numbers and all(n is None for n in numbers[1:]) else None
    elif node.target is aten.index_select.default and node.args[1] == 0:
        index = node.args[2]
    if not isinstance(index, fx.Node) or weight not in constants or weight.meta["val"].ndim < 3:
        return None
    dtype = index.meta["val"].dtype
    return None if dtype == torch.bool or dtype.is_floating_point else (weight, index)


def _through(step: fx.Node, dims: list[Dim]) -> list[Dim] | None:
    """Dimensions after a view."""
    rank = len(dims)
    if step.target in _COPIES:
        return dims
    if step.target is aten.transpose.int:
        first, second = (int(a) % rank for a in step.args[1:3])  # type: ignore[arg-type]
        dims = list(dims)
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    if step.target is aten.permute.default:
        return [dims[int(d) % rank] for d in step.args[1]]  # type: ignore[union-attr, arg-type]
    if step.target is aten.unsqueeze.default:
        at = int(step.args[1]) % (rank + 1)  # type: ignore[arg-type]
        return [*dims[:at], ("one", 0), *dims[at:]]
    return None
