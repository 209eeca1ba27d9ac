"""Which part of a packed projection is queries, keys or values: by what becomes of it, not by where it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["attention_roles"]

aten = torch.ops.aten

_FUSED = {
    aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_ENDS = _FUSED | _PRODUCTS | {aten.linear.default, aten.addmm.default, aten.mm.default, aten.einsum.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_FAR = 60  # values between a part and the product it enters, and between that and a softmax


def attention_roles(parts: Sequence[fx.Node | None]) -> list[str] | None:
    """Names of the parts of one projection, in their order.

    Parameters
    ----------
    parts
        The parts as values.

    Returns
    -------
    list of str
        Some of ``q``, ``k`` and ``v`` in the order of the parts; None if they are not all used as such.
    """
    if len(parts) > 3:
        return None
    roles = [role for part in parts if part is not None and (role := _role(part)) is not None]
    return roles if len(set(roles)) == len(parts) else None


def _role(part: fx.Node) -> str | None:
    """What a part is in the first product that it enters; None if that is none of attention's, or several disagree."""
    seen, queue = {part}, deque([part])
    roles: set[str | None] = set()
    while queue and len(seen) < _FAR:
        at = queue.popleft()
        for user in at.users:
            if user in seen or user.op != "call_function":
                continue
            if user.target not in _ENDS:
                seen.add(user)
                queue.append(user)
            elif user.target in _FUSED:
                roles.add("qkv"[user.args.index(at)] if at in user.args[:3] else None)
            elif user.target in _PRODUCTS and user.args[0] is not user.args[1]:
                roles.add(_of_product(user, at))
            else:
                roles.add(None)
    return roles.pop() if len(roles) == 1 else None


def _of_product(product: fx.Node, operand: fx.Node) -> str | None:
    left, right = product.args[:2]
    if operand is right and _near(left, _SOFTMAX, up=True):
        return "v"
    scores = _near(product, _SOFTMAX, up=False)
    return ("q" if operand is left else "k") if scores else None


def _near(node: Any, wanted: set[Any], *, up: bool) -> bool:
    """Whether one of some operations stands before or behind a value, without a product between."""
    if up and node.target in wanted:
        return True
    seen, queue = {node}, deque([node])
    while queue and len(seen) < _FAR:
        at = queue.popleft()
        for other in at.all_input_nodes if up else list(at.users):
            if other in seen or not isinstance(other.meta.get("val"), Tensor | tuple | list):
                continue
            if other.target in wanted:
                return True
            if other.target not in _ENDS:
                seen.add(other)
                queue.append(other)
    return False
