"""Nodes that stay as they are: one torch operation that holds an ONNX operator, whichever it is.

Eager programs run it with onnxruntime, that node alone. What its results are like is written beside it, so that a graph with such
nodes can be traced, saved and printed without onnxruntime; the ONNX target writes the same node again.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.patterns.capture.onnx.graph import DTYPES, ELEMENT_TYPES, Node
from recast.patterns.errors import ModelError, TargetError

__all__ = ["DONE", "Kept", "described", "is_kept", "kept_node", "results_of"]

DONE = "quantized already"
_NEW = "?"  # a size that nothing among the inputs tells


@torch.library.custom_op("recast::onnx_node", mutates_args=())
def kept_node(
    inputs: Sequence[Tensor | None], operator: str, version: int, attributes: str, results: str, reason: str
) -> list[Tensor]:
    """Run an ONNX operator as onnxruntime does.

    Parameters
    ----------
    inputs
        What it reads, None for what was left out.
    operator
        Type, behind its domain and ``::`` if that is not the standard one.
    version
        Of its domain's operators.
    attributes
        As JSON: numbers, texts, lists of these.
    results
        As JSON, for each result its ONNX element type and its sizes: a number, ``"i.d"`` for the size of dimension ``d`` of input
        ``i``, ``"i.d*n"`` and ``"i.d/n"`` for multiples of it, ``"?"`` for what is known only when it runs.
    reason
        Why it stays.

    Returns
    -------
    list of Tensor

    Raises
    ------
    TargetError
        onnxruntime is not installed, or refuses the operator or its inputs.
    """
    session = _session(
        operator,
        version,
        attributes,
        len(json.loads(results)),
        tuple(None if t is None else (t.dtype, t.ndim) for t in inputs),
    )
    feeds = {f"x{i}": t.detach().cpu().contiguous().numpy() for i, t in enumerate(inputs) if t is not None}
    try:
        found = session.run(None, feeds)
    except Exception as error:  # onnxruntime has a class for every status; all mean the same here
        raise TargetError(f"onnx: ONNX Runtime does not run {operator}: {str(error).splitlines()[0]}") from error
    return [torch.from_numpy(value).clone() for value in found]


@kept_node.register_fake
def _(
    inputs: Sequence[Tensor | None], operator: str, version: int, attributes: str, results: str, reason: str
) -> list[Tensor]:
    made = []
    for element, sizes in json.loads(results):
        shape = [_size(size, inputs) for size in sizes]
        made.append(torch.empty(shape, dtype=DTYPES[element]))
    return made


def _size(size: int | str, inputs: Sequence[Tensor | None]) -> Any:
    if isinstance(size, int):
        return size
    if size == _NEW:
        return torch.library.get_ctx().new_dynamic_size()
    place, factor, divisor = size, 1, 1
    if "*" in size:
        place, _, text = size.partition("*")
        factor = int(text)
    elif "/" in size:
        place, _, text = size.partition("/")
        divisor = int(text)
    position, _, dimension = place.partition(".")
    tensor = inputs[int(position)]
    assert tensor is not None
    return tensor.shape[int(dimension)] * factor // divisor


@functools.lru_cache(maxsize=512)
def _session(operator: str, version: int, attributes: str, results: int, inputs: tuple[Any, ...]) -> Any:
    """A session of one node, whose inputs have these dtypes and numbers of dimensions."""
    try:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise TargetError(
            f"the ONNX operator {operator} runs with onnx and onnxruntime, of which one is not installed; pip install 'recast[onnx]'"
        ) from error
    make = onnx.helper
    domain, _, kind = operator.rpartition("::")
    node = make.make_node(
        kind,
        ["" if given is None else f"x{i}" for i, given in enumerate(inputs)],
        [f"y{i}" for i in range(results)],
        domain=domain,
        **json.loads(attributes),
    )
    values = [
        make.make_tensor_value_info(f"x{i}", ELEMENT_TYPES[given[0]], [None] * given[1])
        for i, given in enumerate(inputs)
        if given is not None
    ]
    outputs = [onnx.ValueInfoProto(name=f"y{i}") for i in range(results)]
    graph = make.make_graph([node], "node", values, outputs)
    opsets = [make.make_opsetid(domain, version)] + ([make.make_opsetid("", 21)] if domain else [])
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise TargetError(
            f"onnx: ONNX Runtime {runtime.__version__} does not know {operator} of version {version}, nor does recast: "
            f"{str(error).splitlines()[0]}"
        ) from error


# -- on the way into a graph -------------------------------------------------------------------------


class Kept:
    """Nodes that a graph keeps, and what their results are like, which is seen by running the graph on inputs of several sizes."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        self.nodes: dict[int, Node] = {}
        self._seen: dict[int, list[tuple[list[Any], list[Tensor]]]] = {}
        self._written: dict[int, str] = {}

    def run(self, place: int, node: Node, inputs: list[Tensor | None], reason: str, *, watch: bool) -> list[Tensor]:
        """Run a node, at its place in the graph; `watch` notes what it gives."""
        self.reasons[place], self.nodes[place] = reason, node
        if watch or place not in self._written:
            blank = json.dumps([[1, []]] * len(node.outputs))
            found: list[Tensor] = kept_node(inputs, node.operator, node.version, _attributes(node), blank, reason)
            shapes = [None if t is None else list(t.shape) for t in inputs]
            self._seen.setdefault(place, []).append((shapes, found))
            self._written[place] = json.dumps(_results(self._seen[place]))
            self._seen[place][-1] = (shapes, [t.to("meta") for t in found])
            return found
        result: list[Tensor] = kept_node(
            inputs, node.operator, node.version, _attributes(node), self._written[place], reason
        )
        return result


def _attributes(node: Node) -> str:
    for name, value in node.attributes.items():
        flat = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int | float | str) for v in flat):
            raise ModelError(
                f"onnx: {node.operator} '{node.label}' is not known here, and holds a {type(flat[0]).__name__} as '{name}'; only "
                "operators whose attributes are numbers and texts can be kept"
            )
    return json.dumps(dict(sorted(node.attributes.items())))


def _results(seen: list[tuple[list[Any], list[Tensor]]]) -> list[list[Any]]:
    """For each result, its element type and how its sizes follow from those of the inputs in every run."""
    described = []
    for position, result in enumerate(seen[-1][1]):
        sizes: list[int | str] = []
        for dimension in range(result.ndim):
            here = [made[position].shape[dimension] for _, made in seen]
            sizes.append(_follows(here, dimension, [shapes for shapes, _ in seen]))
        described.append([ELEMENT_TYPES[result.dtype], sizes])
    return described


def _follows(sizes: list[int], dimension: int, shapes: list[list[Any]]) -> int | str:
    """How a size follows: constant, that of an input (first at the same place), or a multiple of one."""
    if len(set(sizes)) == 1 and len(sizes) > 1:
        return sizes[0]
    places = [(i, d) for i, shape in enumerate(shapes[0]) if shape is not None for d in range(len(shape))]
    places.sort(key=lambda place: (place[1] != dimension, place))
    for i, d in places:
        if all(shape[i][d] == size for shape, size in zip(shapes, sizes, strict=True)):
            return f"{i}.{d}"
    if len(sizes) == 1:
        return sizes[0]
    for i, d in places:
        given = [shape[i][d] for shape in shapes]
        if (
            all(g and s % g == 0 for g, s in zip(given, sizes, strict=True))
            and len({s // g for g, s in zip(given, sizes, strict=True)}) == 1
        ):
            return f"{i}.{d}*{sizes[0] // given[0]}"
        if (
            all(s and g % s == 0 for g, s in zip(given, sizes, strict=True))
            and len({g // s for g, s in zip(given, sizes, strict=True)}) == 1
        ):
            return f"{i}.{d}/{given[0] // sizes[0]}"
    return _NEW


# -- in a graph ----------------------------------------------------------------------------------------


def is_kept(node: object) -> bool:
    """Whether a graph node is an ONNX operator that was left as it is."""
    return isinstance(node, fx.Node) and node.target is torch.ops.recast.onnx_node.default


def described(node: fx.Node) -> tuple[str, str]:
    """Operator of such a node, and why it was left."""
    return str(node.args[1]), str(node.args[5])


def results_of(node: fx.Node) -> list[int]:
    """ONNX element types of its results."""
    return [int(element) for element, _ in json.loads(str(node.args[4]))]
