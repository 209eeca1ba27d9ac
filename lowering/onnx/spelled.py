"""What other exporters spell out, as the operations that recast writes when it exports the model itself.

A file that was made by another tool holds GELU as ``x * 0.5 * (1 + erf(x / sqrt(2)))``, layer norms as means and roots, and the scores
of attention as queries and transposed keys that are scaled before they meet, or after. Each is the same function as one operation here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from recast.lowering.onnx.evaluate import Unknown, evaluate
from recast.lowering.onnx.fuse import splice
from recast.lowering.onnx.weights import contrib
from recast.passes.dialect import inline_dialect
from recast.patterns.norm import layer
from recast.patterns.norm.emit import emit
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.sites import NormSite

__all__ = ["gather_spelled"]

aten = torch.ops.aten
_MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
_DIVIDE = {aten.div.Tensor, aten.div.Scalar}
_LAYOUTS = {
    aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default,
}  # fmt: skip
_STEPS = 8
_CLOSE = 1e-5
_MOST = 1e4


def gather_spelled(program: Program, standard: bool = False) -> Program:
    """Layer norms, GELU and the scores of attention as one operation each; equal up to rounding.

    Parameters
    ----------
    program
        Without operator nodes; may be changed in place.
    standard
        Scores in standard operators alone.
    """
    program = _norms(program)
    for node in list(program.graph.nodes):
        if node.target in (aten.erf.default, aten.tanh.default):
            _gelu(program, node)
    for node in list(program.graph.nodes):
        if node.target is aten.softmax.int:
            _scores(program, node, standard)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.module.recompile()
    return program


def _norms(program: Program) -> Program:
    """Layer norms that are written out as `aten.layer_norm`, without whose spelling nothing is looked for."""
    centred = {aten.mean.dim, aten.var.correction, aten.var_mean.correction}
    if not any(n.target in centred and any(u.target is aten.sub.Tensor for u in n.users) for n in program.graph.nodes):
        return program
    replaced: dict[fx.Node, fx.Node] = {}
    for site in recognise(program, only=layer.RULES).sites:
        if not isinstance(site, NormSite) or site.node is None:
            continue
        function, args, kwargs = emit(site)
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: replaced.get(n, n))
        with program.graph.inserting_before(site.node):
            call = program.graph.call_function(function, args, kwargs)
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        replaced[site.node] = call
    return inline_dialect(program)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _scaled(node: Any) -> tuple[Any, float]:
    """What a value is without the numbers that it is multiplied with and divided by, and their product."""
    factor = 1.0
    while isinstance(node, fx.Node) and len(node.args) == 2 and node.target in _MULTIPLY | _DIVIDE:
        number = _number(node.args[1])
        if number is None or not number:
            break
        factor = factor * number if node.target in _MULTIPLY else factor / number
        node = node.args[0]
    return node, factor


def _gelu(program: Program, bent: fx.Node) -> None:
    """``0.5 x (1 + erf(x / sqrt(2)))``, or with a tanh, in any order of its factors; what it computes is tried on numbers."""
    node, x = bent, None
    for _ in range(_STEPS):
        if len(node.users) != 1:
            return
        (user,) = node.users
        added = user.target in (aten.add.Tensor, aten.add.Scalar) and node is bent and not user.kwargs
        if not added and user.target not in _MULTIPLY | _DIVIDE:
            return
        others = [a for a in user.args if a is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node) and x is None:
            x, _ = _scaled(others[0])
        node = user
        if x is not None and _is_gelu(program, node, x, bent):
            return


def _is_gelu(program: Program, root: fx.Node, x: fx.Node, bent: fx.Node) -> bool:
    example = torch.linspace(-6, 6, 49, dtype=torch.float64)
    try:
        found = evaluate(root, {x: example})
    except Unknown:
        return False
    kind = "none" if bent.target is aten.erf.default else "tanh"
    if found.shape != example.shape or not _alike(found, F.gelu(example, approximate=kind)):
        return False
    with program.graph.inserting_before(root):
        made = program.graph.call_function(aten.gelu.default, (x,), {"approximate": kind} if kind == "tanh" else {})
    made.meta = dict(root.meta)
    root.replace_all_uses_with(made)
    program.graph.erase_node(root)
    return True


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= _CLOSE * wanted.abs() + 1e-6).all())


def _scores(program: Program, softmax: fx.Node, standard: bool) -> None:
    """``scale * (a q) @ (b k')`` before a softmax as one product with its scale and its transpose."""
    scores: Any = softmax.args[0]
    if scores.target is aten.add.Tensor and not scores.kwargs:
        scores = next((a for a in scores.args if _product(a) is not None), None)
    product = _product(scores)
    if product is None or any(len(n.users) > 1 for n in (scores, product)):
        return
    _, factor = _scaled(scores)
    (query, before), (turned, beside) = (_scaled(a) for a in product.args[:2])
    factor *= before * beside
    key, order = _keys(turned)
    if key is None and math.isclose(factor, 1.0):
        return
    if abs(factor) > _MOST or abs(factor) < 1 / _MOST:  # it may be meant to keep a product from overflowing
        return

    def run(q: Tensor, k: Tensor) -> Tensor:
        k = k if order is None else k.permute(order)
        wide = k.transpose(-1, -2) if key is not None else k
        if standard:
            return torch.matmul(q * factor, wide)
        turned = int(key is not None)
        return contrib("FusedMatMul", [q, k], [*q.shape[:-1], wide.shape[-1]], alpha=factor, transB=turned)

    made = splice(program, scores, run, [query, turned if key is None else key])
    scores.replace_all_uses_with(made)


def _keys(turned: fx.Node) -> tuple[fx.Node | None, list[int] | None]:
    """The keys whose transpose a value is, and in which order their dimensions are to be taken; tried on numbers."""
    shape = turned.meta["val"].shape
    node, found = turned, None
    for _ in range(_STEPS):
        if node.target not in _LAYOUTS:
            break
        node = node.args[0]  # type: ignore[assignment]
        value = node.meta["val"]
        if value.dim() != len(shape):
            continue
        sizes = [s if isinstance(s, int) else 2 + i for i, s in enumerate(value.shape)]
        example = torch.arange(float(math.prod(sizes))).reshape(sizes)
        try:
            result = evaluate(turned, {node: example}, resized=(value.shape, sizes))
        except Unknown:
            continue
        if torch.equal(result, example.transpose(-1, -2)):
            return node, None
        if len(sizes) == 4 and torch.equal(result, example.permute(0, 2, 3, 1)):
            found = found or (node, [0, 2, 1, 3])
    return found or (None, None)


def _product(node: Any) -> fx.Node | None:
    """The product of two values, both of them computed, that a value is up to its scale."""
    node, _ = _scaled(node)
    if not isinstance(node, fx.Node) or node.target not in (aten.matmul.default, aten.bmm.default):
        return None
    operands = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    values = [a.meta.get("val") for a in operands]
    fits = len(values) == 2 and all(isinstance(v, Tensor) and v.dtype == torch.float32 and v.dim() > 2 for v in values)
    return node if fits else None
