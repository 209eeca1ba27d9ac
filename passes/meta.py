"""Shapes and dtypes of new nodes, by a fake-tensor run over what lacks them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from recast.patterns.program import Program, get_by_path

__all__ = ["fake_mode_of", "fake_values", "propagate"]


def fake_mode_of(program: Program) -> FakeTensorMode:
    """The fake-tensor mode the program was traced in, so that symbols keep their meaning."""
    for node in program.inputs():
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def propagate(program: Program) -> None:
    """Give every node without ``meta["val"]`` its value's shape and dtype; existing ones are kept."""
    mode = fake_mode_of(program)
    fakes: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    for node in program.graph.nodes:
        if "val" in node.meta or node.op == "output":
            continue
        node.meta["val"] = _value(node, program, mode, fakes, modules)


def fake_values(program: Program) -> dict[fx.Node, Any]:
    """What a fake-tensor run of the whole program gives for every node."""
    mode = fake_mode_of(program)
    fakes: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = node.meta.get("val")
        elif node.op != "output":
            found[node] = _value(node, program, mode, fakes, modules, found)
    return found


def _value(
    node: fx.Node,
    program: Program,
    mode: FakeTensorMode,
    fakes: dict[str, Any],
    modules: dict[str, Any],
    known: dict[fx.Node, Any] | None = None,
) -> Any:
    if node.op == "get_attr":
        value = get_by_path(program.module, str(node.target))
        if not isinstance(value, Tensor):
            return value
        if node.target not in fakes:
            with _disable_current_modes():
                fakes[str(node.target)] = mode.from_tensor(value, static_shapes=True)
        return fakes[str(node.target)]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n] if known else n.meta["val"])
    guards: Any = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()
    with mode, guards, torch.no_grad():
        if node.op == "call_module":
            module = program.module.get_submodule(str(node.target))
            return module.fake(mode, modules)(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
