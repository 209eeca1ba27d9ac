"""Features that leave some linears and enter others: where each of them lies on the way, and the way made narrower.

Features carry numbers (labels); features with one label stay or go together. Labels are followed through the model's own views,
splits, elementwise steps and the core of attention, at the captured example's sizes. -1 stands for features that always stay.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.follow import is_cast, moves, run_on
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import fixed_size

__all__ = ["Picks", "Refused", "Way", "check_linear", "narrow", "spread", "stays"]

aten = torch.ops.aten

Way = dict[fx.Node, Any]  # labels of each value, a list of them for what gives several
Picks = dict[fx.Node, list[fx.Node]]  # elementwise steps, and their operands that hold a number for each feature

_REPEATS = {aten.repeat_interleave.self_int, aten.repeat.default}
_SAME = {aten.dropout.default}
_FACTORS = {aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default}
_SIZED = {aten.view.default: 1, aten.reshape.default: 1, aten._unsafe_view.default: 1, aten.expand.default: 1}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}
_BATCHED = {aten.bmm.default, aten.matmul.default}


class Refused(Exception):
    """A block cannot be made smaller, and why: a clause that may follow the block's name."""


def spread(
    sources: Mapping[fx.Node, Tensor],
    ends: Collection[fx.Node],
    position: Mapping[fx.Node, int],
    picks: Picks | None = None,
) -> Way:
    """Follow the features of some values to where they end.

    Parameters
    ----------
    sources
        Values and the labels of their last dimension's features, int32 (features,).
    ends
        Products that may take what comes; nothing else may, but what computes elementwise, moves or mixes along tokens.
    position
        Of each value in the graph.
    picks
        Filled with what holds a number for each feature (the angles of a rotary embedding): to be chosen from as well. Without
        it such a step is refused.

    Raises
    ------
    Refused
        Something else reads the features, or steps mix or distinguish them.
    """
    way: Way = {node: labels.expand(_sizes(node)).contiguous() for node, labels in sources.items()}
    waiting: list[tuple[int, fx.Node]] = []
    seen = {*sources, *ends}

    def reach(node: fx.Node) -> None:
        for user in node.users:
            if user.op == "output":
                raise Refused(f"'{node.name}' is a result of the model itself")
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, (position[user], user))

    for node in sources:
        reach(node)
    while waiting:
        _, node = heapq.heappop(waiting)
        labels = _labels(node, way, picks)
        if labels is not None and any(bool((piece >= 0).any()) for piece in _pieces(labels)):
            way[node] = labels
            reach(node)
    return way


def _sizes(node: fx.Node) -> list[int]:
    return [size_hint(s) for s in node.meta["val"].shape]


def _pieces(labels: Any) -> Sequence[Tensor]:
    return (labels,) if isinstance(labels, Tensor) else labels


def _labels(node: fx.Node, way: Way, picks: Picks | None) -> Any:
    """Labels of what a value computes from labelled ones; None if they do not go into it."""
    target, read = node.target, [n for n in node.all_input_nodes if n in way]
    if target is aten.sym_size.int or (target is aten.type_as.default and node.args[0] not in way):
        return None  # a size, a dtype
    if (moves(node) or target in _REPEATS) and read == [node.args[0]]:
        return run_on(node, way[read[0]])
    if target is aten.glu.default:
        first, second = way[read[0]].chunk(2, int(node.args[1]) if len(node.args) > 1 else -1)  # type: ignore[arg-type]
        if not torch.equal(first, second):
            raise Refused(f"'{node.name}' multiplies features that do not belong together")
        return first
    if target in _SAME or is_cast(node) or _elementwise(target):
        return _joined(node, read, way, picks)
    if target is aten.cat.default:
        joined: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        if set(read) == set(joined):
            return torch.cat([way[n] for n in joined], dim)
    if target is aten.scaled_dot_product_attention.default and read == [node.args[2]]:
        return _mixed(node, way[read[0]])
    if target in _BATCHED and read == [node.args[1]]:
        return _mixed(node, way[read[0]])
    raise Refused(f"'{node.name}' ({getattr(target, '_opname', target)}) stands in the way and reads all features")


def _elementwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def check_linear(way: Way, sources: Collection[fx.Node]) -> None:
    """Refuse a way on which features cannot be mixed at its beginning instead of its end: one with steps that are not linear."""
    for node in way:
        if node in sources or moves(node) or is_cast(node) or not _elementwise(node.target):
            continue
        read = [n for n in node.all_input_nodes if n in way]
        first = node.target in _FACTORS and read == [node.args[0]]
        if not first and not (node.target is aten.mul.Tensor and len(read) == 1 and node.args[0] is not node.args[1]):
            raise Refused(
                f"'{node.name}' ({getattr(node.target, '_opname', node.target)}) is not linear in the features"
            )


def _joined(node: fx.Node, read: list[fx.Node], way: Way, picks: Picks | None) -> Tensor:
    """Labels of an elementwise step: those of its operands, which must agree; other operands must not tell features apart."""
    shape = _sizes(node)
    labels, *others = [torch.broadcast_to(way[n], shape) for n in read]
    if any(not torch.equal(labels, other) for other in others):
        raise Refused(f"'{node.name}' joins features that do not belong together")
    if bool((labels != labels[..., :1]).any()):
        for operand in node.all_input_nodes:
            if operand in way or _size_of(operand, -1, len(shape)) == 1:
                continue
            if picks is None:
                raise Refused(f"'{operand.name}' holds a number for each feature, which '{node.name}' applies")
            picks.setdefault(node, []).append(operand)
    joined: Tensor = labels.contiguous()
    return joined


def _size_of(operand: fx.Node, axis: int, rank: int) -> int | None:
    """Size of an elementwise operand along a dimension of the result, counted from the last; None if it is free."""
    value = operand.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < -axis or rank < -axis:
        return 1
    return fixed_size(value.shape[axis])


def _mixed(node: fx.Node, labels: Tensor) -> Tensor:
    """Labels behind a product that mixes tokens: those of any one token, for each head."""
    first, shape = labels[..., :1, :], _sizes(node)
    if not torch.equal(first.expand(labels.shape), labels):
        raise Refused(f"'{node.name}' mixes features with tokens")
    if first.ndim > 2 and 1 < first.shape[-3] < shape[-3]:  # several query heads share one of values
        first = first.repeat_interleave(shape[-3] // first.shape[-3], -3)
    return first.expand(shape).contiguous()


def narrow(way: Way, sources: Collection[fx.Node], kept: Tensor, *, change: bool = True) -> None:
    """Rewrite the sizes that operations on the way name, for features with other labels than `kept` are gone.

    Shapes of the values that change are forgotten. Nothing is changed if something is refused.

    Parameters
    ----------
    way
        From `spread`.
    sources
        Where it began: these are made anew by whoever asks.
    kept
        Labels that stay.
    change
        False only looks whether it can be done.

    Raises
    ------
    Refused
        What stays does not fill an array, or a size is computed while the model runs.
    """
    kept = kept.to(torch.int32)
    left = {node: [_left(node, piece, kept) for piece in _pieces(labels)] for node, labels in way.items()}
    for node in way:
        if node not in sources and _elementwise(node.target):
            _check_operands(node, way, left[node][0])
    changes = [
        (node, *_rewritten(node, way, left, kept))
        for node in way
        if node not in sources and (_changed(way[node], left[node]) or _reads_changed(node, way, left))
    ]
    for node, target, args in changes if change else []:
        node.target, node.args = target, args
        node.meta.pop("val", None)


def stays(labels: Tensor, kept: Tensor) -> Tensor:
    """Which features stay: those of a label that is kept, and those without one."""
    return (labels < 0) | torch.isin(labels, kept)


def _left(node: fx.Node, labels: Tensor, kept: Tensor) -> list[int]:
    """Sizes of the array that what stays of a value fills."""
    sizes, mask = list(labels.shape), stays(labels, kept)
    for axis in reversed(range(mask.ndim)):
        counts = mask.sum(axis)
        found = counts[counts > 0]
        if not found.numel() or int(found.min()) != int(found.max()):
            raise Refused(f"what stays of '{node.name}' does not fill an array")
        sizes[axis], mask = int(found[0]), counts > 0
    return sizes


def _check_operands(node: fx.Node, way: Way, left: list[int]) -> None:
    """Refuse an elementwise step whose other operand has as many numbers as there were, but for features of the last dimension."""
    rank = len(left)
    for axis in range(-rank, -1):
        if left[axis] != way[node].shape[axis]:
            for operand in node.all_input_nodes:
                if operand not in way and _size_of(operand, axis, rank) != 1:
                    raise Refused(f"'{operand.name}' holds a number for each feature, which '{node.name}' applies")


def _changed(labels: Any, left: list[list[int]]) -> bool:
    return any(list(piece.shape) != sizes for piece, sizes in zip(_pieces(labels), left, strict=True))


def _reads_changed(node: fx.Node, way: Way, left: dict[fx.Node, list[list[int]]]) -> bool:
    return any(n in way and _changed(way[n], left[n]) for n in node.all_input_nodes)


def _rewritten(
    node: fx.Node, way: Way, left: dict[fx.Node, list[list[int]]], kept: Tensor
) -> tuple[Any, tuple[Any, ...]]:
    """The operation of a value and its arguments, with sizes as they are when only what stays is there."""
    target: Any = node.target
    args: list[Any] = list(node.args)
    rank = len(left[node.args[0]][0]) if node.args and node.args[0] in left else 0  # type: ignore[index]
    if target in _SIZED:
        args[1] = _listed(node, args[1], 0, way[node], left[node][0])
        # Attention may lay its result out differently when values are narrower, so that a view would not do.
        target = target if target is aten.expand.default else aten.reshape.default
    elif target is aten.unflatten.int:
        args[2] = _listed(node, args[2], args[1] % rank, way[node], left[node][0])
    elif target in _SPLITS:
        given: Any = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
        dim = int(given) % rank
        if left[args[0]][0][dim] != way[args[0]].shape[dim]:
            return aten.split_with_sizes.default, (args[0], [sizes[dim] for sizes in left[node]], dim)
    elif target in (aten.slice.Tensor, aten.narrow.default):
        dim = int(args[1] if len(args) > 1 else 0) % rank
        return target, _sliced(node, dim, way, left, kept)
    elif target in (aten.select.int, aten.unbind.int):
        dim = int(args[1] if len(args) > 1 else 0) % rank
        if left[args[0]][0][dim] != way[args[0]].shape[dim]:
            raise Refused(f"'{node.name}' takes features one by one")
    elif target is aten.squeeze.default and 1 in left[node.args[0]][0]:  # type: ignore[index]
        raise Refused(f"'{node.name}' would drop the one feature that is left")
    return target, tuple(args)


def _listed(node: fx.Node, sizes: Any, first: int, labels: Tensor, left: list[int]) -> list[Any]:
    """A list of sizes with those of changed dimensions put right."""
    found = list(sizes)
    for i, size in enumerate(found):
        if left[first + i] == labels.shape[first + i] or (isinstance(size, int) and size == -1):
            continue
        if not isinstance(size, int):
            raise Refused(f"'{node.name}' has a size that is computed from '{size}'")
        found[i] = left[first + i]
    return found


def _sliced(node: fx.Node, dim: int, way: Way, left: dict[fx.Node, list[list[int]]], kept: Tensor) -> tuple[Any, ...]:
    """Arguments of a slice whose operand lost features."""
    source: Any = node.args[0]
    labels, count = way[source], left[node][0][dim]
    if left[source][0][dim] == labels.shape[dim]:
        return node.args
    given: list[Any] = [*node.args[2:], None, None][:2]
    step: Any = node.args[4] if len(node.args) > 4 else 1
    if step != 1 and not any(isinstance(n, fx.Node) for n in (*given, step)):  # gate and up in turns, for one
        lines = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
        taken, stay = lines[0][given[0] : given[1] : step], stays(lines[0], kept)
        alike = torch.equal(lines[0][stay][given[0] : given[1] : step], taken[stays(taken, kept)])
        if alike and bool((lines == lines[0]).all()):
            return node.args
    if any(isinstance(n, fx.Node) for n in given) or step != 1:
        raise Refused(f"'{node.name}' takes features at places that are computed, or every so many")
    start = int(given[0] or 0)
    start = min(start + labels.shape[dim] if start < 0 else start, labels.shape[dim])
    before = stays(labels.narrow(dim, 0, start), kept)
    first = int(before.sum(dim).max()) if start else 0
    second = count if node.target is aten.narrow.default else first + count
    return (source, dim, first, second)
