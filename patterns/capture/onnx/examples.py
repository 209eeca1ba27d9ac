"""Inputs for a graph, made from the types and names of its inputs."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from recast.patterns.capture.onnx.graph import Graph, Input

__all__ = ["examples", "vocabularies"]

_BATCH = (2, 3)
_LENGTHS = (7, 11, 13, 17, 19, 23), (13, 19, 7, 23, 11, 17)  # no size is another's by chance
_SEEN_THROUGH = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}


def examples(graph: Graph, vocabulary: dict[str, int], turn: int = 0) -> dict[str, Tensor]:
    """One tensor for each input.

    Parameters
    ----------
    graph
        Whose inputs they are.
    vocabulary
        For inputs that are looked up, how many rows there are.
    turn
        0 or 1: free sizes differ between the two.
    """
    sizes = _sizes(graph.inputs, turn)
    generator = torch.Generator().manual_seed(turn)
    return {value.name: _example(value, sizes[value.name], vocabulary, generator) for value in graph.inputs}


def _sizes(inputs: list[Input], turn: int) -> dict[str, list[int]]:
    """A size for each free name; the first dimension is a batch, sums of names are sums of their sizes."""
    known: dict[str, int] = {}
    lengths = iter(_LENGTHS[turn] * 8)
    for value in inputs:
        for axis, size in enumerate(value.shape):
            if isinstance(size, str) and axis == 0:
                known.setdefault(size, _BATCH[turn])
    names = [size for value in inputs for size in value.shape if isinstance(size, str)]
    for name in names:
        if name not in known and re.fullmatch(r"\w+", name) and not name.startswith("total_"):
            known[name] = next(lengths)
    for name in names:
        if name not in known:
            parts = [part.strip() for part in name.split("+")]
            if name.startswith("total_"):  # of a cache and what comes to it
                parts = [other for other in known if "sequence" in other and not other.startswith("total_")]
            found = [int(part) if part.isdecimal() else known.get(part) for part in parts]
            plain = [size for size in found if size is not None]
            known[name] = sum(plain) if plain and len(plain) == len(found) else next(lengths)
    return {value.name: [size if isinstance(size, int) else known[size] for size in value.shape] for value in inputs}


def _example(value: Input, shape: list[int], vocabulary: dict[str, int], generator: torch.Generator) -> Tensor:
    name, dtype = value.name.lower(), value.dtype
    if dtype == torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if value.name in vocabulary and "type" not in name and "segment" not in name and "position" not in name:
        return torch.randint(0, vocabulary[value.name], shape, generator=generator).to(dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).expand(shape).to(dtype).contiguous()
    return torch.zeros(shape, dtype=dtype)


def vocabularies(graph: Graph) -> dict[str, int]:
    """For each input that a table is looked up by, the number of rows of the smallest."""
    found: dict[str, int] = {}
    origin = {value.name: value.name for value in graph.inputs}
    for node in graph.nodes:
        if node.type in _SEEN_THROUGH and node.inputs[0] in origin:
            origin[node.outputs[0]] = origin[node.inputs[0]]
        elif node.type == "Gather" and node.inputs[1] in origin and not node.attributes.get("axis", 0):
            _note(found, graph, origin[node.inputs[1]], node.inputs[0])
        elif node.type == "EmbedLayerNormalization":
            for position, table in ((0, 2), (1, 4), (8, 3)):
                if position < len(node.inputs) and node.inputs[position] in origin:
                    _note(found, graph, origin[node.inputs[position]], node.inputs[table])
    return found


def _note(found: dict[str, int], graph: Graph, name: str, table: str) -> None:
    held = graph.constants.get(table)
    if held is not None and held.ndim:
        found[name] = min(found.get(name, len(held)), len(held))
