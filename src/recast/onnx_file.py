"""What an ONNX file is made of: its products with constant matrices."""

from __future__ import annotations

import collections
import math
import os
from pathlib import Path
from typing import Any

from recast.models import require
from recast.patterns.capture.onnx.program import kept_nodes
from recast.patterns.errors import ModelError
from recast.patterns.program import Program

__all__ = ["described", "inspect_onnx"]

# Position of the weight among the inputs of the operators that multiply by one.
_PRODUCTS = {
    "MatMul": (1, 0),
    "Gemm": (1, 0),
    "Conv": (1,),
    "MatMulNBits": (1,),
    "MatMulInteger": (1, 0),
    "DynamicQuantizeMatMul": (1,),
    "MatMulIntegerToFloat": (1,),
    "QLinearMatMul": (3,),
    "FusedMatMul": (1, 0),
    "QAttention": (1,),
    "Attention": (1,),
}
_FLOATING = {"MatMul", "Gemm", "Conv", "FusedMatMul", "Attention"}
_LOOKED_THROUGH = {"DequantizeLinear", "Transpose", "Cast", "Reshape", "Identity"}


def inspect_onnx(path: Path) -> tuple[dict[str, Any], str]:
    """Coverage of an ONNX file as a dict, and as text.

    Raises
    ------
    ModelError
        The file is missing or no ONNX model.
    TargetError
        The package onnx is not installed.
    """
    onnx = require("onnx", f"the ONNX file '{path.name}'")
    if not path.is_file():
        raise ModelError(f"model: there is no file '{path}'")
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # protobuf raises errors of its own
        raise ModelError(f"model: '{path}' is not an ONNX model: {error}") from error
    constants = {t.name: tuple(t.dims) for t in model.graph.initializer}
    packed: set[str] = set()  # constants that are unpacked as the graph runs
    for node in model.graph.node:
        operands = [name for name in node.input if name]
        if node.op_type in _LOOKED_THROUGH and operands and operands[0] in constants:
            constants.update(dict.fromkeys(node.output, constants[operands[0]]))
            if node.op_type == "DequantizeLinear" or operands[0] in packed:
                packed.update(node.output)
    sites, misses = [], []
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        weights = [node.input[i] for i in _PRODUCTS[node.op_type] if i < len(node.input) and node.input[i] in constants]
        name = node.name or (node.output[0] if node.output else node.op_type)
        if weights:
            shape = _shape(node, constants[weights[0]])
            sites.append(
                {
                    "name": name,
                    "kind": "linear",
                    "weights": weights[:1],
                    "operator": node.op_type,
                    "shape": shape,
                    "quantized": node.op_type not in _FLOATING or weights[0] in packed,
                }
            )
        else:
            reason = "both operands are activations"
            misses.append({"name": name, "kind": "product", "parameters": 0, "reason": reason, "node": node.op_type})
    matched = sum({s["weights"][0]: math.prod(s["shape"]) for s in sites}.values())
    counts = collections.Counter(node.op_type for node in model.graph.node)
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    data = {
        "model": path.stem,
        "parameters": {"total": matched, "matched": matched},
        "flops": {"total": 0, "matched": 0},
        "sites": {"linear": len(sites), "attention": 0, "moe": 0, "norm": 0},
        "misses": misses,
        "site_list": sites,
        "operators": dict(counts.most_common()),
        "inputs": inputs,
        "outputs": outputs,
    }
    lines = [
        f"{path.name}: {len(model.graph.node)} operators, {len(sites)} products with a constant matrix",
        f"inputs {', '.join(inputs)}; outputs {', '.join(outputs)}",
        "operators: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()),
        *(f"  {s['name']}: {s['operator']} {'×'.join(map(str, s['shape']))}" for s in sites),
        *(f"  miss {m['name']}: {m['node']}, {m['reason']}" for m in misses),
    ]
    return data, "\n".join(lines)


def described(program: Program, listed: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What `recast inspect` tells of a program read from a file: the coverage, with what the file has done already.

    Parameters
    ----------
    program
        As captured.
    listed
        What `inspect_onnx` gives.
    found
        The coverage as a dict, with ``site_list``.

    Returns
    -------
    dict
        Products with matrices that are quantized already count among the sites, marked ``quantized``; ``kept`` lists every ONNX
        operator that stays as it is, with the reason.
    """
    done = [site for site in listed["site_list"] if site["quantized"]]
    sites = {**found["sites"], "linear": found["sites"]["linear"] + len(done)}
    kept = [{"node": name, "operator": kind, "reason": why} for name, kind, why in kept_nodes(program)]
    file = {name: listed[name] for name in ("operators", "inputs", "outputs")}
    return {**found, **file, "sites": sites, "site_list": [*found["site_list"], *done], "kept": kept}


def _shape(node: Any, dims: tuple[int, ...]) -> list[int]:
    """Shape of the matrix; a packed 4-bit weight says it in its attributes."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        return [int(attributes["N"]), int(attributes["K"])]
    return list(dims)
