"""How a product with a constant matrix is written: one function a family of operations, each giving a `Use` or a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.constants import Constants
from recast.patterns.contraction import Contraction
from recast.patterns.linear.routed import gathered, grouped, is_grouped
from recast.patterns.sites import Use

__all__ = ["SPELLINGS", "einsum_letters", "is_matrix", "spell"]

aten = torch.ops.aten
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Found = Use | str  # a use, or why there is none


def spell(node: fx.Node, constants: Constants) -> Found | None:
    """Read a node as a product with a constant matrix.

    Returns
    -------
    Use, str or None
        The use; a sentence saying why this product is none; or None if the node is no product at all.
    """
    if node.op != "call_function":
        return None
    if is_grouped(node.target):
        found = grouped(node, constants)
    elif node.target in SPELLINGS:
        found = SPELLINGS[node.target](node, constants)
    else:
        return None
    if isinstance(found, Use) and (reason := found.contraction.reason()):
        return reason
    return found


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _operands(
    node: fx.Node, left: Any, right: Any, letters: tuple[str, str, str], constants: Constants, **extra: Any
) -> Found:
    """Decide which operand of ``left @ right`` is the weight."""
    a, b, y = letters
    if left in constants and right in constants:
        return "both operands are constant: a product of weights, not with activations"
    if right in constants:
        return _use(node, left, right, (a, b, y), **extra)
    if left in constants:
        return _use(node, right, left, (b, a, y), **extra)
    for x, weight, letters in ((left, right, (a, b, y)), (right, left, (b, a, y))):
        if (found := gathered(node, x, weight, letters, constants)) is not None:
            return dataclasses.replace(found, **extra) if isinstance(found, Use) else found
    return "both operands are computed: the weight is not constant"


def _use(node: fx.Node, x: fx.Node, weight: fx.Node, letters: tuple[str, str, str], **extra: Any) -> Found:
    a, w, y = letters
    sizes = dict(zip(w, weight.meta["val"].shape, strict=False))
    if not all(isinstance(s, int) for s in sizes.values()):
        return "the weight's shape depends on the input"
    given = dict(zip(a, x.meta["val"].shape, strict=True))
    paired = [d for d in w if d in a and d in y]
    once = [d for d in paired if sizes[d] == 1]  # a batch of one matrix serves every slice: no batch at all
    if wide := [d for d in paired if d not in once and given[d] != sizes[d]]:
        return f"the activation is broadcast over the weight's {' and '.join(str(sizes[d]) for d in wide)} matrices"
    if spread := [d for d in w if d in a and d not in y and given[d] != sizes[d]]:
        return f"a summed dimension is broadcast ({given[spread[0]]} against {sizes[spread[0]]})"
    kept = "".join(d for d in w if d not in once)
    return Use(node, node, x, weight, Contraction(a, kept, y), weight_shape=tuple(sizes[d] for d in kept), **extra)


def _linear(node: fx.Node, constants: Constants) -> Found:
    x, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    if weight not in constants:
        rank = _rank(x)  # type: ignore[arg-type]
        letters = (_LETTERS[: rank - 1] + "y", "zy"[2 - _rank(weight) :], _LETTERS[: rank - 1] + "z")  # type: ignore[arg-type]
        if (found := gathered(node, x, weight, letters, constants)) is not None:
            return found if isinstance(found, str) else dataclasses.replace(found, addend=bias)  # type: ignore[arg-type]
        return "the weight of this linear is computed, not constant"
    if x in constants:
        return "both operands are constant: a product of weights, not with activations"
    if _rank(weight) != 2:  # type: ignore[arg-type]
        return "the weight is a vector, not a matrix"
    lead = _LETTERS[: _rank(x) - 1]  # type: ignore[arg-type]
    role = "bias" if bias is None or bias in constants else "addend"
    return _use(node, x, weight, (lead + "y", "zy", lead + "z"), **{role: bias})  # type: ignore[arg-type]


def _mm(node: fx.Node, constants: Constants) -> Found:
    return _operands(node, node.args[0], node.args[1], ("ab", "bc", "ac"), constants)


def _bmm(node: fx.Node, constants: Constants) -> Found:
    return _operands(node, node.args[0], node.args[1], ("eab", "ebc", "eac"), constants)


def _plus(node: fx.Node, letters: tuple[str, str, str], constants: Constants) -> Found:
    for name in ("alpha", "beta"):
        if node.kwargs.get(name, 1) != 1:
            return f"{name}={node.kwargs[name]} scales the product"
    addend, left, right = node.args
    found = _operands(node, left, right, letters, constants)
    if isinstance(found, str):
        return found
    width = node.meta["val"].shape[-1]
    last = found.contraction.y.endswith(found.contraction.outputs)
    is_bias = addend in constants and addend.meta["val"].shape == (width,) and last  # type: ignore[union-attr]
    return dataclasses.replace(found, **{"bias" if is_bias else "addend": addend})  # type: ignore[arg-type]


def _addmm(node: fx.Node, constants: Constants) -> Found:
    return _plus(node, ("ab", "bc", "ac"), constants)


def _baddbmm(node: fx.Node, constants: Constants) -> Found:
    return _plus(node, ("eab", "ebc", "eac"), constants)


def _matmul(node: fx.Node, constants: Constants) -> Found:
    left, right = node.args[0], node.args[1]
    ranks = _rank(left), _rank(right)  # type: ignore[arg-type]
    lead = _LETTERS[: max(0, max(ranks) - 2)]
    a = ("" if ranks[0] == 1 else lead[len(lead) - (ranks[0] - 2) :] + "x") + "y"
    b = "y" if ranks[1] == 1 else lead[len(lead) - (ranks[1] - 2) :] + "yz"
    y = lead + ("" if ranks[0] == 1 else "x") + ("" if ranks[1] == 1 else "z")
    return _operands(node, left, right, (a, b, y), constants)


def _einsum(node: fx.Node, constants: Constants) -> Found:
    operands: Any = node.args[1]
    if len(operands) != 2:
        return f"einsum of {len(operands)} operands"
    left, right = operands
    a, b, y = einsum_letters(str(node.args[0]), (_rank(left), _rank(right)))
    return _operands(node, left, right, (a, b, y), constants)


def einsum_letters(equation: str, ranks: tuple[int, ...]) -> tuple[str, ...]:
    """Terms of an equation and its result, an ellipsis and an implied result written out.

    Examples
    --------
    >>> einsum_letters("...i,io", (3, 2))
    ('ABi', 'io', 'ABo')
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    widths = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
    spare = "".join(d for d in _LETTERS.upper() + _LETTERS if d not in equation)[: max(widths)]
    if not arrow:  # what appears once, in alphabetical order, behind the ellipsis
        letters = inputs.replace(".", "").replace(",", "")
        result = "..." * ("..." in inputs) + "".join(sorted(d for d in set(letters) if letters.count(d) == 1))
    # Dimensions of an ellipsis are aligned from the right.
    written = [t.replace("...", spare[len(spare) - w :]) for t, w in zip(terms, widths, strict=True)]
    return (*written, result.replace("...", spare))


def _convolution(node: fx.Node, constants: Constants) -> Found:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x: Any = given["input"]
    weight, bias = given["weight"], given.get("bias")
    if weight not in constants or not isinstance(weight, fx.Node):
        return "the kernel of this convolution is computed, not constant"
    shape = weight.meta["val"].shape
    stride, padding, groups = given.get("stride", 1), given.get("padding", 0), given.get("groups", 1)
    if any(s != 1 for s in shape[2:]):
        return f"a convolution with a kernel of {'x'.join(str(s) for s in shape[2:])}, not 1x1"
    if groups != 1:
        return f"a 1x1 convolution with groups={groups}"
    if any(s != 1 for s in _all(stride)):
        return f"a 1x1 convolution with stride {stride}"
    if padding not in ("valid", "same") and any(p != 0 for p in _all(padding)):
        return f"a 1x1 convolution with padding {padding}"
    space = _LETTERS[: len(shape) - 2]
    lead = "n" if _rank(x) == len(shape) else ""
    if lead and "n" in space:
        return "a convolution over too many dimensions"
    if bias is not None and bias not in constants:
        return "the bias of this convolution is computed, not constant"
    return _use(node, x, weight, (f"{lead}y{space}", "zy", f"{lead}z{space}"), bias=bias)


def _all(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


SPELLINGS: dict[Any, Callable[[fx.Node, Constants], Found]] = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
    aten.mv.default: lambda node, c: _operands(node, node.args[0], node.args[1], ("ab", "b", "a"), c),
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
}


def is_matrix(value: Any) -> bool:
    """Whether a weight counts as a matrix: floating point, two or more dimensions longer than one."""
    return isinstance(value, Tensor) and value.is_floating_point() and sum(s > 1 for s in value.shape) >= 2
