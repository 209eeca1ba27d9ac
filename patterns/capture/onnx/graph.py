"""An ONNX graph as plain data: nodes, constants as torch tensors, inputs with their types. Nothing here needs the package onnx."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "ELEMENT_TYPES", "Graph", "Input", "Node"]

# ONNX's numbers for element types that torch has too.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
ELEMENT_TYPES = {dtype: number for number, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Parameters
    ----------
    domain, type
        What it does; the domain of the standard operators is empty.
    version
        Of the domain's operators in this file.
    inputs, outputs
        Names of values; an empty one stands for nothing.
    attributes
        Numbers, texts, tensors, lists of these, or graphs.
    name
        As in the file, often empty.
    scope
        Dotted path of the module it came from, as far as the file tells.
    """

    domain: str
    type: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    scope: str = ""

    @property
    def operator(self) -> str:
        """Type with its domain, where that is not the standard one."""
        return f"{self.domain}::{self.type}" if self.domain else self.type

    @property
    def label(self) -> str:
        """Name for messages: its own, or that of its first result."""
        return self.name or next((name for name in self.outputs if name), self.type)


@dataclasses.dataclass(frozen=True)
class Input:
    """What a graph is given.

    Parameters
    ----------
    name
        As in the file.
    dtype
        Of the tensor.
    shape
        A number for a size that is fixed, a name for one that is free: sizes of one name are equal.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclasses.dataclass
class Graph:
    """A graph in the order in which it runs.

    Parameters
    ----------
    inputs, outputs
        Without the constants, which old files list among the inputs.
    nodes
        Every one after those that it reads.
    constants
        Initializers and the results of Constant nodes.
    label
        Of the file.
    """

    inputs: list[Input]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Tensor]
    label: str = "model"
