"""Packed weights: which rows of one matrix the model takes apart and uses as matrices of their own."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.linear.roles import attention_roles
from recast.patterns.sites import Part, Use

__all__ = ["packed_parts", "rows_read", "size_hint"]

aten = torch.ops.aten

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unflatten.int,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
}
_KEEPS = {aten.add.Tensor, aten._to_copy.default, aten.to.dtype}  # a bias, a cast: every value stays in its place
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.split.sizes}
_TAKES = {aten.slice.Tensor, aten.select.int, aten.narrow.default}
_LIMIT = 1 << 27  # elements followed; larger examples are left unpacked


def size_hint(size: Any) -> int:
    """Size in the captured example; 1 where it depends on values there (how many tokens an expert gets)."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.hint is not None else 1


def packed_parts(use: Use, name: str) -> tuple[Part, ...]:
    """Find how the result of a product is split along its output features.

    The rows are followed by running the model's own views and splits on row numbers, so interleaved layouts (each head's Q, K
    and V side by side) are found as well as plain ones.

    Parameters
    ----------
    use
        A product whose weight may be packed.
    name
        Site name, a hint for naming the parts.

    Returns
    -------
    tuple of Part
        Disjoint parts that cover all rows; empty if the weight is not packed.
    """
    shape = [size_hint(s) for s in use.node.meta["val"].shape]
    outputs, y = use.contraction.outputs, use.contraction.y
    if use.routing is not None:  # the result has the rows' letters besides
        y = use.routing.y
    if len(outputs) != 1 or use.addend is not None:
        return ()
    axis = y.index(outputs)
    rows = shape[axis]
    # Other dimensions are followed at their example sizes only because views mention them.
    total = 1
    for size in shape:
        total *= size
    if total > _LIMIT or not _taken_apart(use.node):
        return ()
    index = (
        torch.arange(rows, dtype=torch.int32).view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    )
    try:
        pieces = _follow(use.node, index.contiguous())
    except RuntimeError:  # views of sizes that only values tell
        return ()
    if not pieces:
        return ()
    sets = [torch.unique(piece) for piece, _ in pieces]
    if not all(len(s) for s in sets):  # a slice that is empty at the example's sizes
        return ()
    covered = torch.unique(torch.cat(sets))
    if sum(len(s) for s in sets) != len(covered):
        return ()
    order = sorted(range(len(sets)), key=lambda i: int(sets[i][0]))
    sets = [sets[i] for i in order]
    roles = attention_roles([pieces[i][1] for i in order])
    if len(covered) != rows:  # attention takes some rows, and nothing takes the others
        if roles is None:
            return ()
        sets.append(torch.tensor(sorted(set(range(rows)) - set(covered.tolist()))))
        roles.append("unused")
    elif len(sets) < 2:
        return ()
    names = roles or _names(name, [len(s) for s in sets])
    return tuple(Part(n, _ranges(s)) for n, s in zip(names, sets, strict=True))


def rows_read(use: Use, path: Sequence[fx.Node]) -> set[int] | None:
    """Rows of a packed weight that reach the end of a path of views and splits.

    Parameters
    ----------
    use
        The packed product.
    path
        Values after it, each reading the one before.

    Returns
    -------
    set of int
        Row numbers as far as the path only views and takes apart; None if the rows cannot be followed.
    """
    shape = [size_hint(s) for s in use.node.meta["val"].shape]
    outputs = use.contraction.outputs
    y = use.contraction.y if use.routing is None else use.routing.y
    if len(outputs) != 1 or math.prod(shape) > _LIMIT:
        return None
    axis = y.index(outputs)
    index = torch.arange(shape[axis], dtype=torch.int32)
    value: Any = index.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).contiguous()
    for node in path:
        if node.target is operator.getitem:
            value = value[int(node.args[1])]  # type: ignore[arg-type]
        elif node.target in _VIEWS | _SPLITS | _TAKES:
            try:
                value = _run(node, value)
            except RuntimeError:  # views of sizes that only values tell
                return None
        elif node.target in _KEEPS and isinstance(value, Tensor) and _same_size(node, value):
            continue
        else:
            break
    if not isinstance(value, Tensor):
        return None
    return set(torch.unique(value).tolist())


def _taken_apart(node: fx.Node) -> bool:
    """Whether views of a result lead to splits, before anything is computed."""
    return bool(node.users) and all(
        u.target in _TAKES | _SPLITS or (u.target in _VIEWS | _KEEPS and _taken_apart(u)) for u in node.users
    )


def _follow(node: fx.Node, value: Tensor) -> list[tuple[Tensor, fx.Node | None]] | None:
    """Row numbers in each piece that the result is taken apart into, and the piece; None if some use takes all of it."""
    pieces: list[tuple[Tensor, fx.Node | None]] = []
    for user in node.users:
        found: list[tuple[Tensor, fx.Node | None]] | None = None
        if user.target in _VIEWS:
            found = _follow(user, _run(user, value))
        elif user.target in _KEEPS and _same_size(user, value):
            found = _follow(user, value)
        elif user.target in _SPLITS:
            taken = {u.args[1]: u for u in user.users if u.target is operator.getitem}
            found = [(piece, taken.get(i)) for i, piece in enumerate(_run(user, value))] if taken else None
        elif user.target in _TAKES:
            found = [(_run(user, value), user)]
        if found is None:
            return None
        pieces += found
    return pieces or None


def _same_size(node: fx.Node, value: Tensor) -> bool:
    return [size_hint(s) for s in node.meta["val"].shape] == list(value.shape)


def _run(node: fx.Node, value: Tensor) -> Any:
    def concrete(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return size_hint(arg) if isinstance(arg, torch.SymInt) else arg
        meta = arg.meta.get("val")
        return value if isinstance(meta, Tensor) else size_hint(meta)

    args: Any = fx.node.map_aggregate(node.args, concrete)
    kwargs: Any = fx.node.map_aggregate(node.kwargs, concrete)
    sizes: Any = node.args[1] if node.target in _VIEWS and len(node.args) > 1 else None
    unknown = [i for i, size in enumerate(sizes) if _only_values_tell(size)] if isinstance(sizes, list | tuple) else []
    if unknown and -1 not in args[1]:  # the last of them follows from the others
        args = (args[0], [-1 if i == unknown[-1] else size for i, size in enumerate(args[1])], *args[2:])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _only_values_tell(size: Any) -> bool:
    held = size.meta.get("val") if isinstance(size, fx.Node) else size
    return isinstance(held, torch.SymInt) and held.node.hint is None


def _ranges(rows: Tensor) -> tuple[tuple[int, int], ...]:
    numbers = rows.tolist()
    breaks = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), len(numbers)]
    return tuple((numbers[a], numbers[b - 1] + 1) for a, b in itertools.pairwise(breaks))


def _names(name: str, sizes: list[int]) -> list[str]:
    low = name.rsplit(".", 1)[-1].lower()
    if len(sizes) == 3 and sizes[1] == sizes[2] and sizes[0] >= sizes[1]:
        return ["q", "k", "v"]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        if any(word in low for word in ("gate", "up", "w12", "glu", "fc1", "wi", "in_proj", "dense_h")):
            return ["gate", "up"]
        if any(word in low for word in ("kv", "key_value")):
            return ["k", "v"]
    return [str(i) for i in range(len(sizes))]
