"""Attention with a cache as ONNX Runtime's GroupQueryAttention, where that computes the same.

The mask, the rotation and the repetition of heads are computed on small examples and compared with what the operator does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from recast.lowering.onnx.evaluate import Unknown, evaluate
from recast.lowering.onnx.fuse import splice
from recast.lowering.onnx.products import Product, products_of
from recast.patterns.program import Program, set_by_path

__all__ = ["group_attention"]

aten = torch.ops.aten
_LONGEST = 1 << 15  # tokens after which no window is looked for
_TABLE = "recast_rotary"


class _Refused(Exception):
    """Why an attention stays as it is."""


@dataclass(frozen=True)
class _Rotation:
    """Queries or keys before they are rotated, (batch, heads, sequence, features), and by what."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass(frozen=True)
class _Attention:
    """One attention with its cache."""

    product: Product
    key: fx.Node  # the new ones, before they join the cache
    value: fx.Node
    past: tuple[fx.Node, fx.Node]
    joined: tuple[fx.Node, fx.Node]
    rotations: tuple[_Rotation, _Rotation] | None
    window: int
    scale: float


def group_attention(program: Program) -> str | None:
    """Rewrite every attention of a decoder in place, or none.

    Padding then stands after a prompt, not before it: the operator counts the ones of the mask, and takes what they count from
    the start of the cache. With a mask of ones alone the numbers are the same.

    Returns
    -------
    str or None
        Why nothing was rewritten.
    """
    products = products_of(program)
    layers = len((program.decoder or {}).get("cache", ()))
    if not products or len(products) != layers:
        return f"{len(products)} of {layers} layers compute attention in a way that is known here"
    masks: dict[Any, int] = {}
    tables: dict[tuple[fx.Node, fx.Node], tuple[Tensor, Tensor] | None] = {}
    try:
        found = [_read(program, product, masks, tables) for product in products]
    except (_Refused, Unknown) as refused:
        return str(refused)
    whole = all(attention.rotations is not None for attention in found)
    lengths = _lengths(program, products[0].node)
    for attention in found:
        _rewrite(program, attention, lengths, tables if whole else None)
    program.graph.eliminate_dead_code()
    return None


def _read(program: Program, given: Product, masks: dict[Any, int], tables: dict[Any, Any]) -> _Attention:
    node, query, key, value, mask = given.node, given.query, given.key, given.value, given.mask
    if given.causal or given.dropout or not isinstance(mask, fx.Node):
        raise _Refused(f"'{node.name}' has no mask over what is in its cache")
    if any(n.meta["val"].dtype != torch.float32 or n.meta["val"].dim() != 4 for n in (query, key, value)):
        raise _Refused(f"'{node.name}' is not of float32 with (batch, heads, sequence, features)")
    heads = query.meta["val"].shape[1]
    ways = [_from_cache(n, heads, given.shared) for n in (key, value)]
    (past_key, new_key, joined_key), (past_value, new_value, joined_value) = ways
    sizes = {n.meta["val"].shape[-1] for n in (query, past_key, past_value)}
    if len(sizes) != 1 or past_key.meta["val"].shape[1] != past_value.meta["val"].shape[1]:
        raise _Refused(f"'{node.name}' has keys and values of different sizes ({sorted(sizes)})")
    (size,) = sizes
    if size % 8:
        raise _Refused(f"'{node.name}' has heads of {size} features, which are no multiple of 8")
    positions = int((program.decoder or {}).get("positions") or 0)
    if mask not in masks:
        masks[mask] = _window(program, mask, positions)
    rotated = (_rotation(query), _rotation(new_key))
    pair = None
    if rotated[0] is not None and rotated[1] is not None and positions and size % 16 == 0:
        turns = rotated[0].cos, rotated[0].sin
        if turns == (rotated[1].cos, rotated[1].sin):
            if turns not in tables:
                tables[turns] = _tables(program, *turns, size, positions)  # None: they are left in the graph
            pair = (rotated[0], rotated[1]) if tables[turns] is not None else None
    scale = float(given.scale) if given.scale is not None else float(size) ** -0.5
    return _Attention(
        given, new_key, new_value, (past_key, past_value), (joined_key, joined_value), pair, masks[mask], scale
    )


def _from_cache(node: fx.Node, heads: int, grouped: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """What is in the cache, what is new, and both joined, of keys or values whose heads may be repeated."""
    joined: Any = node
    repeated = []
    while joined.target is not aten.cat.default:
        if joined.op != "call_function" or not joined.args or not isinstance(joined.args[0], fx.Node):
            raise _Refused(f"'{node.name}' is no cache that new ones were joined to")
        repeated.append(joined)
        joined = joined.args[0]
    parts, dimension = joined.args[0], joined.args[1] if len(joined.args) > 1 else 0
    if len(parts) != 2 or dimension not in (-2, 2) or parts[0].op != "placeholder":
        raise _Refused(f"'{joined.name}' does not join new keys or values to those of the cache")
    held = joined.meta["val"].shape[1]
    if repeated:
        size = joined.meta["val"].shape[-1]
        start = torch.arange(2.0 * held * 5 * size).reshape(2, held, 5, size)
        sizes = [joined.meta["val"].shape, start.shape]
        if not torch.equal(evaluate(node, {joined: start}, resized=sizes), start.repeat_interleave(heads // held, 1)):
            raise _Refused(f"'{node.name}' does not repeat the heads of the cache in turn")
    elif held != heads and not grouped:
        raise _Refused(f"'{node.name}' has {held} heads for {heads} of the queries")
    users = {n for n in joined.users if n.op != "output"}
    if len(users) > 1 or any(len(n.users) > 1 for n in repeated):
        raise _Refused(f"'{joined.name}' is used for more than one attention")
    return parts[0], parts[1], joined


def _window(program: Program, mask: fx.Node, positions: int) -> int:
    """How many of the last tokens each sees; -1 for all."""
    length = min(positions or _LONGEST, _LONGEST)
    last = _kept(program, mask, torch.ones(1, length), 1)[0, -1]
    width = int(last.sum())
    if not bool(last[length - width :].all()):
        raise _Refused(f"the mask '{mask.name}' leaves out tokens in between")
    for batch, new, past in ((2, 3, 5), (3, 4, 0), (1, 9, 9), (2, 1, 17)):
        for padded in (False, True):
            given = torch.ones(batch, past + new)
            if padded:
                given[-1, (past + new) // 2] = 0
            far = (torch.arange(new)[:, None] + past) - torch.arange(past + new)
            wanted = (far >= 0) & (far < width) & (given[:, None] > 0)
            if not torch.equal(_kept(program, mask, given, new), wanted):
                raise _Refused(f"the mask '{mask.name}' is neither causal nor a window")
    return -1 if width == length else width


def _kept(program: Program, mask: fx.Node, given: Tensor, new: int) -> Tensor:
    """Which keys a mask leaves, (batch, queries, keys)."""
    value = evaluate(mask, _inputs(program, given, new))
    if value.dim() != 4 or value.shape[1] != 1:
        raise _Refused(f"the mask '{mask.name}' differs from head to head")
    if value.is_floating_point():
        if not bool(((value == 0) | (value <= torch.finfo(value.dtype).min / 2)).all()):
            raise _Refused(f"the mask '{mask.name}' adds numbers to the scores")
        value = value == 0
    return value[:, 0].expand(given.shape[0], new, given.shape[1])


def _inputs(program: Program, mask: Tensor, new: int) -> dict[fx.Node, Tensor]:
    """Values of a program's inputs for a mask (batch, past + new)."""
    batch, total = mask.shape
    made: dict[fx.Node, Tensor] = {}
    for node in program.inputs():
        value = node.meta["val"]
        if node.target == "attention_mask":
            made[node] = mask.to(value.dtype)
        elif node.target == "input_ids":
            made[node] = torch.zeros(batch, new, dtype=value.dtype)
        elif value.dim() == 4:
            made[node] = torch.zeros((), dtype=value.dtype).expand(batch, value.shape[1], total - new, value.shape[3])
    return made


def _rotation(node: fx.Node) -> _Rotation | None:
    """``x cos + [-x2, x1] sin`` over the halves of the features, as transformers write it."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    straight, turned = node.args
    if not all(isinstance(n, fx.Node) and n.target is aten.mul.Tensor for n in (straight, turned)):
        return None
    (x, cos), (halves, sin) = straight.args, turned.args  # type: ignore[union-attr]
    if not isinstance(x, fx.Node) or not isinstance(halves, fx.Node) or halves.target is not aten.cat.default:
        return None
    size = x.meta["val"].shape[-1]
    example = torch.arange(2.0 * size).reshape(1, 1, 2, size)
    try:
        found = evaluate(halves, {x: example})
    except Unknown:
        return None
    a, b = example.chunk(2, -1)
    if not torch.equal(found, torch.cat([-b, a], -1)):
        return None
    turns = [n.args[0] if n.target is aten.unsqueeze.default and n.args[1] == 1 else None for n in (cos, sin)]  # type: ignore[union-attr]
    return _Rotation(x, *turns) if all(isinstance(n, fx.Node) for n in turns) else None  # type: ignore[arg-type]


def _tables(program: Program, cos: fx.Node, sin: fx.Node, size: int, positions: int) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of each position, (positions, size / 2), if that is all they depend on."""
    try:
        return _table(program, cos, size, positions), _table(program, sin, size, positions)
    except (Unknown, _Refused):
        return None


def _table(program: Program, node: fx.Node, size: int, positions: int) -> Tensor:
    if tuple(node.meta["val"].shape[2:]) != (size,):
        raise _Refused(f"'{node.name}' turns a part of the features")
    whole = evaluate(node, _inputs(program, torch.ones(1, positions), positions))[0]
    table = whole[:, : size // 2].contiguous()
    if not torch.equal(whole, torch.cat([table, table], -1)):
        raise _Refused(f"'{node.name}' turns the halves of the features otherwise than each other")
    for batch, new, past in ((2, 1, min(17, positions - 1)), (3, min(4, positions), 0)):
        rows = evaluate(node, _inputs(program, torch.ones(batch, past + new), new))
        if not torch.equal(rows, whole[past : past + new].expand(rows.shape)):
            raise _Refused(f"'{node.name}' depends on more than the position")
    return table


def _lengths(program: Program, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Index of each text's last token, int32 (batch,), and how many tokens the mask is for, int32 (1,)."""
    mask = next(n for n in program.inputs() if n.target == "attention_mask")

    def run(m: Tensor) -> tuple[Tensor, Tensor]:
        total = symbolic("Shape", [m], {"start": 1, "end": 2}, dtype=torch.int64, shape=[1])
        return m.sum(-1).sub(1).to(torch.int32), total.to(torch.int32)

    last, total = splice(program, before, run, [mask])
    return last, total


def _rewrite(
    program: Program, found: _Attention, lengths: tuple[fx.Node, fx.Node], tables: dict[Any, Any] | None
) -> None:
    node, sinks = found.product.node, found.product.sinks
    query, key, turns = found.product.query, found.key, []
    if tables is not None and found.rotations is not None:
        rotations = found.rotations
        query, key = rotations[0].x, rotations[1].x
        pair = rotations[0].cos, rotations[0].sin
        turns = [
            _read_table(program, node, f"{_TABLE}.{name}_{list(tables).index(pair)}", table)
            for name, table in zip(("cos", "sin"), tables[pair], strict=True)
        ]

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Any:
        batch, heads, length, size = q.shape
        given: list[Tensor | None] = [*rest]
        if sinks is not None:  # after the tables, positions and a bias
            given = [*rest[:-1], *[None] * (9 - len(rest)), rest[-1]]
        flat = [t.transpose(1, 2).reshape(batch, length, t.shape[1] * size) for t in (q, k, v)]
        y, present_key, present_value = symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*flat, *given],
            {
                "num_heads": int(heads),
                "kv_num_heads": int(k.shape[1]),
                "scale": found.scale,
                "local_window_size": found.window,
                "do_rotary": int(bool(turns)),
                **({"softcap": found.product.cap} if found.product.cap else {}),
            },
            dtypes=[torch.float32] * 3,
            shapes=[flat[0].shape, *(n.meta["val"].shape for n in found.joined)],
            version=1,
        )
        return y.reshape(batch, length, heads, size).transpose(1, 2), present_key, present_value

    results = splice(
        program,
        node,
        run,
        [query, key, found.value, *found.past, *lengths, *turns, *([] if sinks is None else [sinks])],
    )
    node.replace_all_uses_with(results[0])
    for old, new in zip(found.joined, results[1:], strict=True):
        old.replace_all_uses_with(
            new, delete_user_cb=lambda user: user.op == "output"
        )  # the others are no longer needed


def _read_table(program: Program, before: fx.Node, path: str, table: Tensor) -> fx.Node:
    set_by_path(program.module, path, table)
    with program.graph.inserting_before(before):
        read = program.graph.get_attr(path)
    read.meta["val"] = before.meta["val"].new_empty(tuple(table.shape))
    return read
