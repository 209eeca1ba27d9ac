"""Shapes and dtypes of new nodes, by a fake-tensor run over what lacks them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from recast.patterns.program import Program, get_by_path

__all__ = ["Evaluator", "fake_mode_of", "fake_values", "propagate"]


def fake_mode_of(program: Program) -> FakeTensorMode:
    """The fake-tensor mode the program was traced in, so that symbols keep their meaning."""
    for node in program.inputs():
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def propagate(program: Program) -> None:
    """Give every node without ``meta["val"]`` its value's shape and dtype; existing ones are kept."""
    evaluator = Evaluator(program)
    for node in program.graph.nodes:
        if "val" in node.meta or node.op == "output":
            continue
        node.meta["val"] = evaluator.value(node)


def fake_values(program: Program) -> dict[fx.Node, Any]:
    """What a fake-tensor run of the whole program gives for every node."""
    evaluator = Evaluator(program)
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = node.meta.get("val")
        elif node.op != "output":
            found[node] = evaluator.value(node, found)
    return found


class Evaluator:
    """Shapes and dtypes of single nodes from those of their operands.

    Parameters
    ----------
    program
        Whose nodes are evaluated, in the fake-tensor mode it was traced in.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mode = fake_mode_of(program)
        self._weights: dict[str, Any] = {}

    def value(self, node: fx.Node, known: dict[fx.Node, Any] | None = None) -> Any:
        """What a node computes from its operands' ``meta["val"]``, or from `known` values of them."""
        if node.op == "get_attr":
            return self._weight(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n] if known else n.meta["val"])
        env = self.mode.shape_env
        guards: Any = env.ignore_fresh_unbacked_symbols() if env else contextlib.nullcontext()
        with self.mode, guards, torch.no_grad(), enable_python_dispatcher():
            if node.op == "call_module":
                module = self.program.module.get_submodule(str(node.target))
                return module.outline(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _weight(self, name: str) -> Any:
        value = get_by_path(self.program.module, name)
        if not isinstance(value, Tensor):
            return value
        if name not in self._weights:
            with _disable_current_modes():
                self._weights[name] = self.mode.from_tensor(value, static_shapes=True)
        return self._weights[name]
