"""Operators that were read from an ONNX file and left as they are: written again as the same nodes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx.ops import symbolic_multi_out

from recast.lowering.onnx.session import needed
from recast.patterns.capture.onnx.graph import DTYPES
from recast.patterns.capture.onnx.kept import is_kept, results_of
from recast.patterns.errors import TargetError
from recast.patterns.program import Program

__all__ = ["write_kept"]


def write_kept(program: Program, opset: int) -> None:
    """Put what torch's exporter writes as a node of that operator in the place of each, in a program's graph.

    Raises
    ------
    TargetError
        A standard operator means something else in the opset that is written.
    """
    for node in list(program.graph.nodes):
        if is_kept(node):
            _replace(program, node, opset)


def _replace(program: Program, node: fx.Node, opset: int) -> None:
    inputs, operator, version, attributes = node.args[:4]
    assert isinstance(inputs, list | tuple)
    name = str(operator)
    domain = name.rpartition("::")[0]
    if not domain:
        _same_meaning(name, int(str(version)), opset)
    values = node.meta["val"]
    dtypes = [DTYPES[element] for element in results_of(node)]
    given = [i for i, value in enumerate(inputs) if isinstance(value, fx.Node)]

    def run(*tensors: Tensor) -> list[Tensor]:
        placed: list[Tensor | None] = [None] * len(inputs)
        for i, tensor in zip(given, tensors, strict=True):
            placed[i] = tensor
        made = symbolic_multi_out(
            name,
            placed,
            json.loads(str(attributes)),
            dtypes=dtypes,
            shapes=[value.shape for value in values],
            version=int(str(version)) if domain else None,
        )
        return list(made)

    operands: list[Any] = [inputs[i] for i in given]
    with torch.no_grad():
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*[o.meta["val"] for o in operands])
    environment: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    results: Any = ()
    with program.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                environment[inner] = program.graph.node_copy(inner, lambda n: environment[n])
            elif inner.op == "output":
                results = [environment[n] for n in inner.args[0]]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # each takes one of the results
        program.graph.erase_node(user)
    program.graph.erase_node(node)


def _same_meaning(name: str, version: int, opset: int) -> None:
    schemas = needed("onnx.defs")
    try:
        before, after = (schemas.get_schema(name, v, "").since_version for v in (version, opset))
    except Exception as error:
        raise TargetError(f"target 'onnx': there is no operator '{name}' in opset {opset}: {error}") from error
    if before != after:
        raise TargetError(
            f"target 'onnx': '{name}' of opset {version} was left as it is, and means something else from opset {after} on; "
            f"convert the file to opset {opset} first (onnx.version_converter)"
        )
