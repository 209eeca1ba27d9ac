"""One function an ONNX operator: found by domain and type, called with what a node reads."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from recast.patterns.capture.onnx.graph import Node
from recast.patterns.capture.onnx.values import Known, Left, Value, numbers, tensor_of

__all__ = ["Call", "function_of", "operator", "operators"]

Result = Value | Sequence[Value | None]
Function = Callable[["Call"], Result]
Decorated = TypeVar("Decorated", bound=Function)

_FUNCTIONS: dict[tuple[str, str], Function] = {}


@dataclasses.dataclass(frozen=True)
class Call:
    """A node with the values that it reads.

    Parameters
    ----------
    node
        With its attributes and the version of its operator.
    inputs
        What it reads, None for what was left out.
    wanted
        For each result, whether anything reads it.
    """

    node: Node
    inputs: tuple[Value | None, ...]
    wanted: tuple[bool, ...] = (True,)

    @property
    def version(self) -> int:
        """Of the node's operator set."""
        return self.node.version

    def __getitem__(self, position: int) -> Value:
        """What is read at a position; Left if nothing is."""
        value = self.optional(position)
        if value is None:
            raise Left(f"without its input {position}")
        return value

    def optional(self, position: int) -> Value | None:
        """What is read at a position, or None."""
        return self.inputs[position] if position < len(self.inputs) else None

    def tensor(self, position: int) -> Tensor:
        """What is read at a position, as a tensor."""
        return tensor_of(self[position])

    def maybe(self, position: int) -> Tensor | None:
        """The same, or None."""
        value = self.optional(position)
        return None if value is None else tensor_of(value)

    def known(self, position: int) -> Known:
        """Numbers that are known; Left if they are computed as the graph runs."""
        value = self[position]
        if not isinstance(value, Known):
            raise Left(f"with an input {position} that is computed as the graph runs")
        return value

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is by default."""
        return self.node.attributes.get(name, default)

    def axes(self, position: int = 1) -> list[int] | None:
        """Axes, which old versions hold as an attribute and new ones as an input; None if they are not given."""
        given = self.attribute("axes")
        if given is None and self.optional(position) is not None:
            given = self.known(position).list()
        return None if given is None else numbers(given)

    def only(self, *names: str) -> None:
        """Left if an attribute is given that is not among these."""
        if further := [name for name in self.node.attributes if name not in names]:
            raise Left(f"with {further[0]}={self.node.attributes[further[0]]!r}")

    def refuse(self, **defaults: Any) -> None:
        """Left if one of these attributes is not what it is by default."""
        for name, default in defaults.items():
            if (given := self.attribute(name, default)) != default:
                raise Left(f"with {name}={given!r}")

    def alone(self, results: int = 1) -> None:
        """Left if a result beyond the first ones is read."""
        if any(self.wanted[results:]):
            raise Left(f"with its result {self.wanted.index(True, results)} read")

    def without(self, *positions: int) -> None:
        """Left if an input is given that is rarely."""
        for position in positions:
            if self.optional(position) is not None:
                raise Left(f"with an input {position}")


def operator(*types: str, domain: str = "") -> Callable[[Decorated], Decorated]:
    """Register a function for operators of a domain (the standard one by default)."""

    def register(function: Decorated) -> Decorated:
        for name in types:
            if (domain, name) in _FUNCTIONS:
                raise ValueError(f"two functions for the ONNX operator {domain}::{name}")
            _FUNCTIONS[domain, name] = function
        return function

    return register


def function_of(node: Node) -> Function | None:
    """What runs a node, None if its operator is not known here."""
    return operators().get((node.domain, node.type))


@functools.cache
def operators() -> dict[tuple[str, str], Function]:
    """Every operator known here, by domain and type: those of the files in the folder ``operators``.

    Examples
    --------
    >>> operators()["", "MatMul"].__name__
    'matmul'
    """
    folder = "recast.patterns.capture.onnx.operators"
    for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
        importlib.import_module(f"{folder}.{module.name}")
    return _FUNCTIONS


def same_rank(value: Value, other: Value) -> Any:
    """A value as an operand beside a tensor: one number as a number, if that does not change the shape of the result."""
    if not isinstance(value, Known):
        return value
    rank = other.ndim if isinstance(other, Tensor) else 0
    if value.values.size == 1 and value.values.ndim <= rank and value.dtype != torch.bool:
        return value.number
    return value.tensor()
