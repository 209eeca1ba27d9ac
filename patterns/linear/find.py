"""Find every product with a constant matrix, grouped into sites by matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.constants import Constants
from recast.patterns.linear.naming import site_name
from recast.patterns.linear.packing import packed_parts, size_hint
from recast.patterns.linear.routed import is_grouped
from recast.patterns.linear.spellings import einsum_letters, spell
from recast.patterns.linear.stacked import stacked
from recast.patterns.memo import remembered
from recast.patterns.program import Program, get_by_path
from recast.patterns.sites import LinearSite, Mismatch, Part, Use, source_line

__all__ = ["Matrix", "as_matrix", "find_linear", "matrix_of", "product_flops"]

aten = torch.ops.aten


def find_linear(program: Program, constants: Constants | None = None) -> tuple[list[LinearSite], list[Mismatch]]:
    """Find linear sites, and products that are none with the reason.

    Returns
    -------
    sites
        One for each distinct matrix, in graph order, with all its uses.
    mismatches
        One for each product of activations, or with a weight in a form that cannot be rewritten.
    """
    sites, missed = remembered(program, "linear", lambda: _find(program, constants or Constants(program)))
    return list(sites), list(missed)


def _find(program: Program, constants: Constants) -> tuple[list[LinearSite], list[Mismatch]]:
    grouped: dict[Any, tuple[Matrix, list[Use]]] = {}
    missed: list[Mismatch] = []
    for node in program.graph.nodes:
        found = spell(node, constants) if node not in constants else None  # a product of weights is itself a weight
        if isinstance(found, Use):
            for use in _single_matrices(stacked(_with_following_bias(found, constants), constants)):
                matrix = matrix_of(use, constants)
                grouped.setdefault(matrix.place, (matrix, []))[1].append(use)
        elif found is not None:
            missed.append(_mismatch(node, found, constants))
    names: dict[str, int] = {}
    parts: dict[Any, tuple[Part, ...]] = {}
    sites = [_site(matrix, uses, constants, names, parts) for matrix, uses in grouped.values()]
    sites = _mark_tied(sites, program, constants)
    return sites, missed + _rests(sites, constants)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A constant matrix that need not be read to be known: its weight may have been released.

    Parameters
    ----------
    shape, dtype
        As it is multiplied, ``(out_features, in_features)``.
    place
        Where it lies: equal for the same matrix of the same weight in memory.
    storages
        Memory of the weights it is made of.
    version
        Counts in-place changes of those weights.
    read
        Gives the values.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    place: tuple[Any, ...]
    storages: tuple[torch.UntypedStorage, ...]
    version: int
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def released(self) -> bool:
        """Whether a weight it is made of was freed."""
        return any(storage.nbytes() == 0 for storage in self.storages)

    def rows(self, ranges: tuple[tuple[int, int], ...]) -> Matrix:
        """Some of the rows, in the order given."""

        def read() -> Tensor:
            whole = self.read()
            pieces = [whole[start:stop] for start, stop in ranges]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        count = sum(stop - start for start, stop in ranges)
        place = (*self.place, ranges)
        return dataclasses.replace(self, shape=(count, self.shape[1]), place=place, read=read)


def matrix_of(use: Use, constants: Constants) -> Matrix:
    """The matrix of a use; reading gives a view of the weight where that is possible."""
    layout = as_matrix(constants.layout(use.weight), use)
    storages = tuple(constants.storages(use.weight))
    names = constants.sources[use.weight]
    held = [get_by_path(constants.program.module, name) for name in names]
    version = sum(0 if weight.is_inference() else weight._version for weight in held)
    source = constants.layout(next(n for n in _made_from(use.weight) if n.op == "get_attr"))
    if layout.untyped_storage()._cdata == source.untyped_storage()._cdata:
        offset = held[0].storage_offset()
        where: tuple[Any, ...] = (storages[0]._cdata, offset + layout.storage_offset(), layout.stride())
    else:  # a cast, a sum: known by how it is computed
        where = (
            *(s._cdata for s in storages),
            _expression(use.weight),
            repr(use.contraction.matrix_order()),
            use.index,
        )

    def read() -> Tensor:
        return as_matrix(constants.value(use.weight).detach(), use)

    shape = (int(layout.shape[0]), int(layout.shape[1]))
    return Matrix(shape, layout.dtype, (*where, shape, layout.dtype), storages, version, read)


def as_matrix(value: Tensor, use: Use) -> Tensor:
    """Arrange a weight, or its gradient, as the matrix (out_features, in_features) that a use multiplies with."""
    contraction = use.contraction
    if use.routing is not None:
        value = value.select(0, use.index or 0)
    value = value.reshape(use.weight_shape).permute(contraction.matrix_order())
    sizes = dict(zip(contraction.w, use.weight_shape, strict=True))
    out_features = math.prod(sizes[d] for d in contraction.outputs)
    in_features = math.prod(sizes[d] for d in contraction.inputs)
    matrices: Tensor = value.reshape(-1, out_features, in_features)
    return matrices[0 if use.routing is not None else use.index or 0]


def product_flops(node: fx.Node) -> int:
    """Floating point operations of a product at the captured example's shapes; 0 for other nodes."""
    value = node.meta.get("val")
    if not is_product(node) or not isinstance(value, Tensor):
        return 0
    out = math.prod(size_hint(s) for s in value.shape)
    target, args = node.target, node.args
    if target is aten.scaled_dot_product_attention.default:
        q, k, v = (_sizes(a) for a in args[:3])
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    if target in _FIRST or is_grouped(target):
        return 2 * out * _sizes(args[0])[-1]
    if target in _SECOND:
        return 2 * out * _sizes(args[1])[-1]
    if target is aten.einsum.default:
        shapes = [_sizes(a) for a in args[1]]  # type: ignore[union-attr]
        terms = einsum_letters(str(args[0]), tuple(map(len, shapes)))
        sizes: dict[str, int] = {}
        for term, shape in zip(terms, shapes, strict=False):
            sizes.update({d: max(s, sizes.get(d, 1)) for d, s in zip(term, shape, strict=True)})
        return 2 * math.prod(sizes.values())
    # Transposed convolutions (weight: in, out, ...) spread each input over the kernel, others gather each output from it.
    transposed = "transpose" in target._opname  # type: ignore[union-attr]
    return 2 * (math.prod(_sizes(args[0])) if transposed else out) * math.prod(_sizes(args[1])[1:])


_FIRST = (aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default)
_SECOND = (aten.addmm.default, aten.baddbmm.default)
_OTHERS = (aten.scaled_dot_product_attention.default, aten.einsum.default)
# Answers by operation, as in `is_grouped`.
_known: dict[int, tuple[Any, bool]] = {}


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, or gathers or spreads by a kernel."""
    if node.op != "call_function":
        return False
    target: Any = node.target
    found = _known.get(id(target))
    if found is None or found[0] is not target:
        named = "conv" in str(getattr(target, "_opname", ""))
        answer = named or target in _FIRST or target in _SECOND or target in _OTHERS or is_grouped(target)
        found = _known[id(target)] = (target, answer)
    return found[1]


def _sizes(operand: Any) -> list[int]:
    return [size_hint(s) for s in operand.meta["val"].shape]


def _with_following_bias(use: Use, constants: Constants) -> Use:
    """Take in an addition of a constant vector that follows: ``mm + add`` is a linear with bias."""
    if use.bias is not None or use.addend is not None or use.routing is not None or len(use.node.users) != 1:
        return use
    (follower,) = use.node.users
    if follower.target is not aten.add.Tensor or follower.kwargs.get("alpha", 1) != 1:
        return use
    left, right = follower.args[0], follower.args[1]
    other = right if left is use.node else left
    outputs = use.contraction.outputs
    if (
        other not in constants
        or not isinstance(other, fx.Node)
        or len(outputs) != 1
        or use.contraction.y[-1] != outputs
    ):
        return use
    same_type = follower.meta["val"].dtype == use.node.meta["val"].dtype
    if other.meta["val"].shape != (use.node.meta["val"].shape[-1],) or not same_type:
        return use
    return dataclasses.replace(use, node=follower, bias=other)


def _single_matrices(use: Use) -> list[Use]:
    if use.routing is None and not use.contraction.batch:
        return [use]
    return [dataclasses.replace(use, index=i) for i in range(_matrices(use))]


def _made_from(node: fx.Node) -> list[fx.Node]:
    """A constant and everything that it is computed from, each once, operands before what reads them."""
    found: dict[fx.Node, None] = {}
    stack = [(node, False)]
    while stack:
        at, ready = stack.pop()
        if ready:
            found[at] = None
        elif at not in found:
            stack.append((at, True))
            stack += [(operand, False) for operand in reversed(at.all_input_nodes) if operand not in found]
    return list(found)


def _expression(node: fx.Node) -> str:
    """How a constant is computed, in a line for each step."""
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    for at in _made_from(node):
        if at.op == "get_attr":
            numbers[at] = str(at.target)
            continue
        arguments = fx.node.map_arg((at.args, dict(at.kwargs)), numbers.__getitem__)
        numbers[at] = f"%{len(lines)}"
        lines.append(f"{at.target}{arguments}")
    return "\n".join(lines)


def _site(
    matrix: Matrix,
    uses: list[Use],
    constants: Constants,
    names: dict[str, int],
    parts: dict[Any, tuple[Part, ...]],
) -> LinearSite:
    first = uses[0]
    weights = constants.sources[first.weight]
    name = site_name(first, weights[0])
    names[name] = names.get(name, 0) + 1
    if names[name] > 1:  # the same parameter used as another matrix, a transpose for instance
        name = f"{name}#{names[name]}"
    flops = sum(product_flops(u.product) // _matrices(u) for u in uses)
    return LinearSite(
        name=name,
        weights=weights,
        out_features=matrix.shape[0],
        in_features=matrix.shape[1],
        dtype=matrix.dtype,
        uses=tuple(uses),
        spelling=str(getattr(first.product.target, "_opname", first.product.target)),
        parts=_common_parts(uses, name, parts),
        flops=flops,
        where=source_line(first.product),
    )


def _matrices(use: Use) -> int:
    if use.routing is not None:
        return use.routing.count
    sizes = dict(zip(use.contraction.w, use.weight_shape, strict=True))
    return math.prod(sizes[d] for d in use.contraction.batch)


def _common_parts(uses: list[Use], name: str, known: dict[Any, tuple[Part, ...]]) -> tuple[Part, ...]:
    found = []
    for use in uses:
        # All matrices of a batched weight are taken apart alike: looked at once.
        place = (use.product, use.node, use.contraction, name.rsplit(".", 1)[-1] if use.index is None else None)
        if place not in known:
            known[place] = packed_parts(use, name)
        found.append(known[place])
    return found[0] if all(p == found[0] for p in found) else ()


def _mark_tied(sites: list[LinearSite], program: Program, constants: Constants) -> list[LinearSite]:
    """Note on each site what else reads its parameters, such as an embedding lookup."""
    products = {use.product for site in sites for use in site.uses}
    others: dict[str, list[str]] = {}
    chains = [use.routing.nodes for site in sites for use in site.uses if use.routing is not None]
    between = {node for chain in dict.fromkeys(chains) for node in chain}
    between = {node for node in between if all(u in products or u in between for u in node.users)}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in constants or node in products or node in between:
            continue
        for operand in node.all_input_nodes:
            for weight in constants.sources.get(operand, ()):
                others.setdefault(weight, []).append(node.name)
    return [
        dataclasses.replace(site, tied=tuple(dict.fromkeys(n for w in site.weights for n in others.get(w, ()))))
        for site in sites
    ]


def _rests(sites: list[LinearSite], constants: Constants) -> list[Mismatch]:
    """Weights of which products read a part only: stacks with matrices for experts that compute nothing, for one."""
    read: dict[str, list[LinearSite]] = {}
    for site in sites:
        for name in site.weights:
            read.setdefault(name, []).append(site)
    found = []
    for name, own in read.items():
        whole = constants.weights[name].numel()
        rest = whole - sum(site.parameters for site in own)
        if rest > 0 and not any(site.tied or len(site.weights) > 1 for site in own):
            reason = f"no product reads {rest:,} of its {whole:,} elements"
            found.append(Mismatch(name, "rest", rest, reason, own[0].uses[0].product.name, own[0].where))
    return found


def _mismatch(node: fx.Node, reason: str, constants: Constants) -> Mismatch:
    weights = [w for n in node.all_input_nodes if n in constants for w in constants.sources[n]]
    matrices = [w for w in weights if constants.weights[w].ndim > 1]
    name = matrices[0] if matrices else node.name
    return Mismatch(
        name=name,
        kind="convolution" if "conv" in str(node.target) else "product",
        parameters=constants.weights[name].numel() if matrices else 0,
        reason=reason,
        node=node.name,
        where=source_line(node),
        flops=product_flops(node),
    )
