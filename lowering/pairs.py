"""Two products of one vector as one: the weight of a gate and that of what it gates, laid out alike, with their rows in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from recast.kernels.epilogue.reference import RUN, in_turns
from recast.passes.meta import fake_mode_of
from recast.patterns.program import Program, get_by_path, set_by_path

__all__ = ["as_one", "given", "numbered"]

_LATER = ("bias", "activation", "gated", "factor", "residual")


def given(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call of an operation by name, in the order of its schema, with what is not given as its default.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> given(graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"), 2)))
    {'self': x, 'other': 2, 'alpha': 1}
    """
    schema: Any = node.target._schema  # type: ignore[union-attr]
    positional = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    known = {**defaults, **positional, **node.kwargs}
    return {a.name: known[a.name] for a in schema.arguments}


def numbered(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number values so that those computed by the same operations from the same values have one number.

    Examples
    --------
    >>> graph, relu = fx.Graph(), torch.ops.aten.relu.default
    >>> x = graph.placeholder("x")
    >>> found = [graph.call_function(relu, (x,)) for _ in range(2)]
    >>> numbers = numbered(graph)
    >>> numbers[found[0]] == numbers[found[1]]
    True
    """
    numbers: dict[fx.Node, int] = {}
    seen: dict[Any, int] = {}
    for node in graph.nodes:
        key: Any = node
        if node.op == "get_attr":
            key = "weight", node.target
        elif node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
            key = node.target, repr(arguments)
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


def as_one(
    program: Program,
    place: fx.Node,
    products: tuple[fx.Node, fx.Node],
    biases: tuple[Any, Any],
    rows: Mapping[str, int],
    alike: Mapping[fx.Node, int],
    used: Mapping[str, int],
) -> fx.Node | str:
    """Insert the product of both weights' rows in turns.

    Parameters
    ----------
    program
        Gets the new tensors beside the gate's own, which are removed where nothing else reads them.
    place
        What the product is inserted before.
    products, biases
        Of the gate and of what it gates; nodes of vectors, or None.
    rows
        Along which dimension each tensor of the operation has rows.
    alike
        `numbered` values.
    used
        How many nodes read each tensor of the program.

    Returns
    -------
    The product, gated and not yet activated; or why there is none.
    """
    gate, up = (given(product) for product in products)
    tensors: dict[str, Tensor] = {}
    for name, one in gate.items():
        other = up[name]
        if name in rows:
            found = _both(program, one, other, rows[name], used)
        elif name in _LATER:
            found = None if one == other and not one else f"their {name} differs"
        elif name == "few":
            found = None
        else:
            found = None if _same(program, one, other, alike) else f"their {name} differs"
        if isinstance(found, str):
            return found.replace("it", name) if found.startswith("it ") else found
        if found is not None:
            tensors[name] = found
    count = next(tensor.shape[rows[name]] for name, tensor in tensors.items()) // 2
    bias = _biases(program, biases, count, place.meta["val"].dtype)
    if isinstance(bias, str):
        return bias
    if bias is not None:
        tensors["bias"] = bias
    first = next(gate[name] for name in tensors if name in rows)
    return _inserted(program, place, products, str(first.target).rpartition(".")[0], tensors)


def _both(program: Program, one: Any, other: Any, dim: int, used: Mapping[str, int]) -> Tensor | str | None:
    """A tensor of both in turns."""
    if one is None and other is None:
        return None
    a, b = _held(program, one), _held(program, other)
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return "it differs in shape or dtype"
    if any(used[str(node.target)] > 1 for node in (one, other)):
        return "it is read by others too"
    if a.shape[dim] % RUN:
        return f"{a.shape[dim]} outputs are no multiple of {RUN}"
    return in_turns(a, b, dim)


def _held(program: Program, node: Any) -> Tensor | None:
    """The tensor that a node reads from the program, None if it is computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = get_by_path(program.module, str(node.target))
    return found.detach() if isinstance(found, Tensor) else None


def _same(program: Program, one: Any, other: Any, alike: Mapping[fx.Node, int]) -> bool:
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return bool(one == other)
    if alike[one] == alike[other]:
        return True
    a, b = _held(program, one), _held(program, other)  # tables of two weights
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _biases(program: Program, biases: tuple[Any, Any], count: int, dtype: torch.dtype) -> Tensor | str | None:
    if biases == (None, None):
        return None
    found = [None if bias is None else _held(program, bias) for bias in biases]
    if any(bias is not None and tensor is None for bias, tensor in zip(biases, found, strict=True)):
        return "a bias is computed"
    device = next(tensor.device for tensor in found if tensor is not None)
    gate, up = (torch.zeros(count, dtype=dtype, device=device) if t is None else t for t in found)
    return in_turns(gate, up)


def _inserted(
    program: Program, place: fx.Node, products: tuple[fx.Node, fx.Node], path: str, tensors: Mapping[str, Tensor]
) -> fx.Node:
    graph, mode = program.graph, fake_mode_of(program)
    gate, up = products
    arguments, old = given(gate), [given(product)[name] for product in products for name in tensors if name != "bias"]
    with graph.inserting_before(place):
        for name, tensor in tensors.items():
            label = f"{path}.in_turns_{name}"
            set_by_path(program.module, label, tensor)
            arguments[name] = graph.get_attr(label)
            with _disable_current_modes():
                arguments[name].meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        if "few" in arguments:
            arguments["few"] = min(arguments["few"], given(up)["few"])
        new = graph.call_function(gate.target, tuple({**arguments, "gated": True}.values()))  # type: ignore[arg-type]
    new.meta = {**gate.meta, "val": place.meta["val"]}
    for node in old:
        if isinstance(node, fx.Node):  # its memory is that of the new tensor
            parent, _, name = str(node.target).rpartition(".")
            delattr(get_by_path(program.module, parent), name)
    return new
