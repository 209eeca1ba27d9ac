"""Attention under Inductor on a CPU: torch's own, or `recast::attention_of_heads` where that is measured to be faster.

torch's kernel (2.13) takes keys by blocks of 512 and queries by 32 or more, each by the matrix library, which for the short keys of an
encoder does not come to a quarter of what the processor can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from recast.kernels.attention import short_keys
from recast.kernels.attention.attention_op import attention
from recast.lowering.inductor.masks import essence
from recast.lowering.timing import most_tokens
from recast.passes.dead import remove_dead
from recast.patterns.program import Program

__all__ = ["with_own_attention"]

aten = torch.ops.aten
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Fewest queries for which laying the keys out pays; below, torch's kernel reads each key once and so would ours.
_LEAST = 16
_KEYS = (64, 128, 256, 512, 1024)
_SCORES, _HEADS = 1 << 20, 12  # of what is timed


def with_own_attention(program: Program) -> Program:
    """Replace torch's attention by ours where it may run; the program given is not changed."""
    result = None
    for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        most = _most_keys(node)
        if not most:
            continue
        if result is None:
            result = program.copy()
            copies = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
        own = copies[node]
        given = _given(own)
        scale, depth = given.get("scale"), given["query"].meta["val"].shape[-1]
        mask = given.get("attn_mask")
        operands = (given["query"], given["key"], given["value"], None if mask is None else essence(mask))
        rest = (bool(given.get("is_causal", False)), depth**-0.5 if scale is None else scale, _LEAST, most)
        with result.graph.inserting_before(own):
            made = result.graph.call_function(torch.ops.recast.attention_of_heads.default, (*operands, *rest))
        made.meta.update(own.meta)
        own.replace_all_uses_with(made)
        result.graph.erase_node(own)
    if result is None:
        return program
    remove_dead(result.graph)
    result.graph.lint()
    result.module.recompile()
    return result


def _given(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def _most_keys(node: fx.Node) -> int:
    """The most keys for which ours is faster; 0 where it does not take what there is."""
    given = _given(node)
    if short_keys.unavailable() is not None or given.get("dropout_p", 0.0):
        return 0
    values: list[Any] = [given[name].meta.get("val") for name in ("query", "key", "value")]
    mask = given.get("attn_mask")
    masks: list[Any] = [] if mask is None else [mask.meta.get("val")]
    if any(not isinstance(value, torch.Tensor) for value in (*values, *masks)):
        return 0
    query, key, value = values
    dtypes = {value.dtype for value in values}
    if (
        any(t.device.type != "cpu" for t in (*values, *masks))
        or any(t.dim() != 4 for t in values)
        or dtypes not in ({torch.float32}, {torch.bfloat16})
        or any(t.requires_grad for t in masks)
        or any(not isinstance(size, int) for size in (query.shape[1], key.shape[1], query.shape[3], value.shape[3]))
        or not isinstance(given.get("scale") or 1.0, float)
        or str(query.shape[0]) != str(key.shape[0])
        or str(key.shape[:3]) != str(value.shape[:3])
        or query.shape[1] % key.shape[1]
        or (query.shape[1] != key.shape[1] and not given.get("enable_gqa"))
    ):
        return 0
    longest = key.shape[2]
    if isinstance(longest, int) and not short_keys.fits(longest, key.shape[3], value.shape[3]):
        return 0
    return _measured(query.dtype, key.shape[3], value.shape[3])


def _measured(dtype: torch.dtype, depth: int, width: int) -> int:
    """Among numbers of keys, with as many queries, and heads enough that it is the work and not the call that is timed."""
    keys = [many for many in _KEYS if short_keys.fits(many, depth, width)]

    def ways(length: int) -> tuple[Callable[[], object], Callable[[], object]]:
        # As models have them: rows that are a power of two apart would meet in the same lines of a cache.
        sizes = (-(-_SCORES // (_HEADS * length**2)), length, _HEADS)
        q, k, v = (torch.randn(*sizes, size).to(dtype).transpose(1, 2) for size in (depth, depth, width))

        def run(most: int) -> Any:
            return attention(q, k, v, None, False, depth**-0.5, _LEAST, most)

        return lambda: run(length), lambda: run(0)

    cpu = torch.device("cpu")
    return most_tokens(ways, cpu, "attention", dtype, depth, width, among=keys) if keys else 0
