"""Names of weights: the file's own where they mean something, else those of the modules that read them."""

from __future__ import annotations

import re

from torch import Tensor, nn

from recast.patterns.capture.onnx.graph import Graph, Node

__all__ = ["identifiers", "weight_names"]

# What exporters call values that had no name.
_MADE_UP = re.compile(
    r"onnx::|(_?val|_?v|t|const|_const|tmp|node)_?\d|\d+$|.*_output_\d+|(Attention|MultiHeadAttention)_\d+_"
)
_SEEN_THROUGH = {"Cast", "Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"}
_WEIGHT_OF = {
    "MatMul": (0, 1),
    "Gemm": (1,),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gather": (0,),
    "FusedMatMul": (0, 1),
}
_BIASED = {"Add": (0, 1), "BiasGelu": (1,), "FastGelu": (1,), "SkipLayerNormalization": (4,), "BiasAdd": (0, 1)}


def weight_names(graph: Graph, held: dict[str, Tensor]) -> dict[str, str]:
    """Dotted names for the constants that are held, each once, none of them the path to another.

    ``/encoder/layer.0/attention/self/query/MatMul`` reading ``onnx::MatMul_531`` names it
    ``encoder.layer.0.attention.self.query.weight``.
    """
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in graph.nodes:
        for position, name in enumerate(node.inputs):
            readers.setdefault(name, []).append((node, position))
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in held:
        wanted = _allowed(_own(name) or _from_reader(name, readers) or _cleaned(name))
        while any(f"{prefix}." in taken for prefix in _prefixes(wanted)[:-1]):
            wanted = "_".join(wanted.rsplit(".", 1))  # nothing lies inside of a tensor
        unique, count = wanted, 1
        while unique in taken:
            count += 1
            unique = f"{wanted}_{count}"
        taken.update(_prefixes(unique))
        taken.add(f"{unique}.")
        found[name] = unique
    return found


def identifiers(names: list[str]) -> dict[str, str]:
    """Names that Python takes for those of inputs: ``input:0`` becomes ``input_0``."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"\W+", "_", name).strip("_") or "input"
        plain = plain if plain.isidentifier() else f"input_{plain}"
        while plain in found.values():
            plain += "_"
        found[name] = plain
    return found


def _allowed(name: str) -> str:
    """A path whose parts are not what every module has already, such as ``type``."""
    return ".".join(f"{part}_" if hasattr(nn.Module, part) or part == "training" else part for part in name.split("."))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _own(name: str) -> str:
    if _MADE_UP.match(name) or not re.search(r"[./]", name) or name.endswith(("ReadVariableOp:0", "ReadVariableOp")):
        return ""
    return _cleaned(name)


def _cleaned(name: str) -> str:
    text = re.sub(r"(/read)?:\d+$", "", name).strip("/.")
    parts = [re.sub(r"\W+", "_", part).strip("_") for part in re.split(r"[./]+", text)]
    return ".".join(part for part in parts if part) or "constant"


def _from_reader(name: str, readers: dict[str, list[tuple[Node, int]]]) -> str:
    """Name a constant after the module of the node that reads it, seen through casts and transposes."""
    for _ in range(4):
        found = readers.get(name, [])
        if not found:
            return ""
        node, position = found[0]
        if node.type not in _SEEN_THROUGH:
            break
        name = node.outputs[0]
    if position in _WEIGHT_OF.get(node.type, ()):
        scope = node.scope or _scope_of_bias(node, readers)
        return f"{scope}.weight" if scope else ""
    if node.type == "Attention" and position in (1, 2) and node.scope:
        return f"{node.scope}.qkv.{'weight' if position == 1 else 'bias'}"
    if node.scope and position in _BIASED.get(node.type, ()):
        return f"{node.scope}.bias"
    return f"{node.scope}.{_cleaned(name).rsplit('.', 1)[-1]}" if node.scope else ""


def _scope_of_bias(node: Node, readers: dict[str, list[tuple[Node, int]]]) -> str:
    """Module of the bias that is added to a product right after it."""
    for follower, _ in readers.get(node.outputs[0], []):
        for position in _BIASED.get(follower.type, ()):
            name = follower.inputs[position] if position < len(follower.inputs) else ""
            if name.endswith(".bias") and not _MADE_UP.match(name):
                return _cleaned(name).removesuffix(".bias")
    return ""
