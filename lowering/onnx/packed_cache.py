"""A decoder's cache in bytes: keys and values as int8, with a scale for each head and token beside them.

A vector of D features takes D + 1 bytes instead of 4 D: its codes, and the exponent e of its scale 2^(e/8 - 6). One tensor holds both,
so that inputs and outputs of the graph stay those of any decoder. What is new is rounded before it is attended to: a prompt that comes
at once and one that comes token by token give the same numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.base import Runner
from recast.lowering.onnx.fuse import splice
from recast.passes.meta import fake_mode_of
from recast.patterns.errors import TargetError
from recast.patterns.program import Program

__all__ = ["bytes_a_token", "in_floats", "pack", "pack_cache", "round_cache", "unpack"]

aten = torch.ops.aten
_STEP = math.log(2) / 8  # scales are powers of 2^(1/8): at most 9 % larger than they need be
_SHIFT = 48  # of exponents: largest values from 3e-5 to 1e5 use all codes
_MOST = 127
_SLACK = 1e-3  # in exponents: a vector that was rounded already keeps its scale


def pack(x: Tensor) -> Tensor:
    """Round (..., D) in float32 to int8 (..., D + 1), the last of which is the exponent of the scale.

    Examples
    --------
    >>> pack(torch.tensor([[127.0, -63.6, 0.0], [0.0, 0.0, 0.0]]))
    tensor([[ 127,  -64,    0,   48],
            [   0,    0,    0, -128]], dtype=torch.int8)
    """
    largest = x.abs().amax(-1, keepdim=True)
    exponent = torch.ceil(torch.log(largest / _MOST) / _STEP + (_SHIFT - _SLACK)).clamp(-128.0, 127.0)
    codes = torch.round(x * torch.exp((_SHIFT - exponent) * _STEP)).clamp(-_MOST, _MOST)
    return torch.cat([codes, exponent], -1).to(torch.int8)


def unpack(held: Tensor) -> Tensor:
    """What `pack` rounded to, (..., D) in float32.

    Examples
    --------
    >>> unpack(pack(torch.tensor([127.0, -63.6, 0.0])))
    tensor([127., -64.,   0.])
    """
    size = held.shape[-1] - 1
    codes, exponent = held[..., :size].to(torch.float32), held[..., size:].to(torch.float32)
    return codes * torch.exp((exponent - _SHIFT) * _STEP)


def bytes_a_token(program: Program) -> tuple[int, int]:
    """Bytes that a token takes in the cache, as it was captured and packed."""
    layers = (program.decoder or {}).get("cache", ())
    vectors = [(heads, size) for heads, *sizes in layers for size in sizes]
    wide = getattr(torch, str((program.decoder or {}).get("dtype", "float32"))).itemsize
    return sum(h * size * wide for h, size in vectors), sum(h * (size + 1) for h, size in vectors)


def pack_cache(program: Program) -> None:
    """Let a decoder take and give its cache packed; a program without operator nodes, changed in place.

    Raises
    ------
    TargetError
        Its cache is not of float32, or not joined with what is new and attended to as a whole.
    """
    for past, joined in _joins(program):
        packed = splice(program, joined, pack, [joined.args[0][1]])  # type: ignore[index, list-item]
        with fake_mode_of(program):
            for node in (past, joined):
                value = node.meta["val"]
                held = value.new_empty([*value.shape[:-1], value.shape[-1] + 1], dtype=torch.int8)
                node.meta["packed"] = held
        past.meta["val"] = past.meta.pop("packed")
        with program.graph.inserting_before(joined):
            whole = program.graph.call_function(aten.cat.default, ([past, packed], 2))
        whole.meta["val"] = joined.meta.pop("packed")
        floats = splice(program, joined, unpack, [whole])
        joined.replace_all_uses_with(whole, delete_user_cb=lambda user: user.op == "output")
        joined.replace_all_uses_with(floats)
        program.graph.erase_node(joined)
    program.graph.lint()
    program.module.recompile()


def round_cache(program: Program) -> Program:
    """The program with its cache rounded, in floating point: what a packed one computes."""
    result = program.copy()
    for _, joined in _joins(result):
        before = set(result.graph.nodes)
        rounded = splice(result, joined, lambda x: unpack(pack(x)), [joined], after=True)
        made = set(result.graph.nodes) - before
        joined.replace_all_uses_with(rounded, delete_user_cb=lambda user, made=made: user not in made)  # type: ignore[misc]
    result.graph.lint()
    result.module.recompile()
    return result


def in_floats(run: Runner, inputs: Sequence[str | None], outputs: Sequence[Any]) -> Runner:
    """Call a graph whose cache is packed with a cache in floating point, and give it back so."""
    taken = [bool(name and name.startswith("past_key_values.")) for name in inputs]
    given = [kind == "tensor" and str(name).startswith("present.") for kind, name in outputs]

    def converted(leaves: list[Any]) -> list[Any]:
        results = run([pack(leaf.detach()) if own else leaf for leaf, own in zip(leaves, taken, strict=True)])
        return [unpack(result) if own else result for result, own in zip(results, given, strict=True)]

    return converted


def _joins(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Each tensor of the cache, and its join with what is new."""
    found = []
    for past in program.inputs():
        if not re.fullmatch(r"past_key_values_\d+_[01]", str(past.target)):
            continue
        if past.meta["val"].dtype != torch.float32:
            raise TargetError(
                f"target 'onnx': cache='int8' is for caches of float32, '{past.target}' is {past.meta['val'].dtype}; float() the "
                "model before it is captured, or leave cache out"
            )
        read = [user for user in past.users if user.target is not aten.sym_size.int]
        joined = read[0] if len(read) == 1 and read[0].target is aten.cat.default else None
        parts = list(joined.args[0]) if joined is not None else []  # type: ignore[arg-type]
        along = joined.args[1] if joined is not None and len(joined.args) > 1 else 0
        given_back = joined is not None and any(user.op == "output" for user in joined.users)
        if joined is None or len(parts) != 2 or parts[0] is not past or along not in (2, -2) or not given_back:
            raise TargetError(
                f"target 'onnx': cache='int8' is for caches that new tokens are joined to, and '{past.target}' is used otherwise; "
                "leave cache out"
            )
        found.append((past, joined))
    return found
