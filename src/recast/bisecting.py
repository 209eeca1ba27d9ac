"""Where an ONNX model begins to differ from a program: the first operation after which nothing agrees any more."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from recast.lowering.onnx.session import needed
from recast.models import Model
from recast.patterns.capture.onnx.names import identifiers
from recast.patterns.errors import CalibrationError, ModelError
from recast.patterns.program import Program
from recast.patterns.sites import source_line

__all__ = ["Difference", "bisect", "bisect_models"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What `bisect` found.

    Attributes
    ----------
    outputs
        Relative difference of each floating output, the largest one over the largest value.
    node, operation, where, source
        Of the program: the first value without a like among the model's, its operation, the module and the line of source it
        comes from. Empty where all outputs agree.
    gap
        How near the nearest value of the model comes to it; None where none is of that size.
    operator, name
        Of the ONNX model: the first node whose result has no like in the program, nor has anything after it.
    compared, alike
        Floating values of the program that its outputs rest on, and how many have a like.
    fused
        Outputs agree where ONNX Runtime computes node by node, and not as it runs by itself: one of its fusions is at fault.
    """

    outputs: tuple[float, ...]
    node: str = ""
    operation: str = ""
    where: str = ""
    source: str = ""
    gap: float | None = None
    operator: str = ""
    name: str = ""
    compared: int = 0
    alike: int = 0
    fused: bool = False

    @property
    def agree(self) -> bool:
        """Whether there is nothing to look for."""
        return not self.node and not self.operator and not self.fused

    def __str__(self) -> str:
        gaps = ", ".join(f"{gap:.2g}" for gap in self.outputs)
        if self.fused:
            return f"differs by {gaps} only after ONNX Runtime's own fusions: node by node it agrees"
        if self.agree:
            return f"agrees to {gaps}"
        near = "no value of that size" if self.gap is None else f"the nearest value is off by {self.gap:.2g}"
        at = f" of {self.where}" if self.where else ""
        line = f", {self.source}" if self.source else ""
        told = f"differs by {gaps}; first at '{self.node}' ({self.operation}{at}{line}): {near}"
        if self.operator:
            told += f"; in the ONNX model at the {self.operator} that gives '{self.name}'"
        return f"{told}; {self.alike} of {self.compared} values before it and beside it agree"


def bisect(program: Program, model: Path, batch: Mapping[str, Tensor], *, tolerance: float = 1e-3) -> Difference:
    """Find the first operation of a program that an ONNX model computes otherwise.

    Names tell nothing across an exporter, and fusions leave values out. So values are told by their numbers: two are alike if,
    sorted, they differ by at most `tolerance` of the largest. The first value of the program that has no like, and behind which
    nothing has one, is where the difference comes in; where a fusion leaves a value out, later ones have likes again.

    Parameters
    ----------
    program
        What is right: as captured, or rewritten.
    model
        An ONNX file of the same inputs.
    batch
        Inputs by name, of all inputs.
    tolerance
        Relative to the largest number of a value.

    Raises
    ------
    CalibrationError
        The program does not run on the batch.
    ModelError
        ONNX Runtime does not run the model.
    TargetError
        onnx or onnxruntime is not installed.

    Examples
    --------
    >>> import tempfile, recast
    >>> x = torch.randn(4, 8)
    >>> program = recast.capture(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval(), (x,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recast.lower(program, "onnx").save(f"{folder}/out")
    ...     bisect(program, Path(folder, "out", "model.onnx"), {"input": x}).agree
    True
    """
    interface = program.interface
    try:
        leaves = program.flatten(*(batch[n] for n in interface.args), **{n: batch[n] for n in interface.kwargs})
        watch = _Watch(program)
        with torch.no_grad():
            wanted = [t for t in program.outputs(list(watch.run(*leaves))) if _counts(t)]
    except (TypeError, KeyError, RuntimeError) as error:
        raise CalibrationError(f"bisect: '{program.label}' does not run on the batch: {error}") from error
    feeds = {name: value.numpy() for name, value in batch.items() if isinstance(value, Tensor)}
    plain, order, values = _onnx_values(model, feeds)
    found = [t for t in plain if _counts(t)]
    gaps = tuple(_gap(a, b) for a, b in zip(wanted, found, strict=False))
    if len(wanted) == len(found) and all(gap <= tolerance for gap in gaps):
        return Difference(gaps)
    outputs = [values[name] for name in order.outputs if _counts(values.get(name))]
    if len(wanted) == len(outputs) and all(_gap(a, b) <= tolerance for a, b in zip(wanted, outputs, strict=True)):
        return Difference(gaps, fused=True)
    return _located(watch, program, order, values, gaps, tolerance)


def bisect_models(
    models: Sequence[Model], batch: Mapping[str, Tensor], *, tolerance: float = 1e-3
) -> dict[str, Difference]:
    """`bisect` of every ONNX model but the first against the first; by label.

    Raises
    ------
    ModelError
        The first holds no program, or one of the others is no ONNX model.
    """
    reference, *others = models
    if not others:
        raise ModelError("compare: --bisect needs two models: one that holds a program, and an ONNX artifact or file")
    files = []
    for model in others:
        file = model.file
        if (
            file is None
            and model.artifact is not None
            and model.artifact.target == "onnx"
            and model.directory is not None
        ):
            file = model.directory / "model.onnx"
        if file is None or model.decoder is not None:
            kind = "a decoder with its cache" if model.decoder is not None else f"of target '{model.target}'"
            raise ModelError(f"compare: --bisect looks into ONNX models; '{model.label}' is {kind}")
        files.append(file)
    program = reference.program()
    return {
        model.label: bisect(program, file, batch, tolerance=tolerance)
        for model, file in zip(others, files, strict=True)
    }


def _located(
    watch: _Watch,
    program: Program,
    order: _Order,
    values: Mapping[str, Tensor],
    gaps: tuple[float, ...],
    tolerance: float,
) -> Difference:
    theirs = _Sorted(values.values())
    ours = _Sorted(watch.values.values())
    needed_ = _ancestors(program)
    alike = {node: theirs.gap(value) for node, value in watch.values.items() if node in needed_}
    near = {node for node, gap in alike.items() if gap is not None and gap <= tolerance}
    behind: set[fx.Node] = set()  # nodes that have a like, or something behind them that has
    for node in reversed(list(program.graph.nodes)):
        if node in near or any(user in behind for user in node.users):
            behind.add(node)
    first = next((node for node in program.graph.nodes if node in alike and node not in behind), None)
    known = {name for name, value in values.items() if (gap := ours.gap(value)) is not None and gap <= tolerance}
    leads: set[str] = set()
    for _, inputs, results in reversed(order.nodes):
        if any(name in known or name in leads for name in results):
            leads.update(inputs, results)
    other = next(
        (
            (kind, results[0])
            for kind, _, results in order.nodes
            if _counts(values.get(results[0])) and results[0] not in leads
        ),
        ("", ""),
    )
    if first is None:
        return Difference(gaps, operator=other[0], name=other[1], compared=len(alike), alike=len(near))
    return Difference(
        gaps, first.name, str(first.target), _module_of(first), source_line(first) or "", alike[first], *other,
        compared=len(alike), alike=len(near),
    )  # fmt: skip


class _Watch(fx.Interpreter):
    """Keeps every floating value of a run; weights and inputs tell nothing."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op not in ("placeholder", "get_attr", "output") and _counts(value):
            self.values[n] = value.detach()
        return value


@dataclasses.dataclass(frozen=True)
class _Order:
    """Nodes of an ONNX graph: operator, names of inputs and of results; and the names of the graph's outputs."""

    nodes: list[tuple[str, list[str], list[str]]]
    outputs: list[str]


def _onnx_values(model: Path, feeds: Mapping[str, Any]) -> tuple[list[Tensor], _Order, dict[str, Tensor]]:
    """Run a model as it is, and once more node by node with every value given out."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = identifiers([value.name for value in session.get_inputs()])
        fed = {name: feeds[plain] for name, plain in names.items() if plain in feeds}
        plain = [torch.from_numpy(value) for value in session.run(None, fed)]
        read = onnx.load(str(model))
        nodes = [(n.op_type, list(n.input), [name for name in n.output if name]) for n in read.graph.node]
        outputs = [value.name for value in read.graph.output]
        every = [name for _, _, results in nodes for name in results]
        read.graph.output.extend(onnx.ValueInfoProto(name=name) for name in every if name not in outputs)
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            onnx.save(read, str(file), save_as_external_data=True, location="weights")
            session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            given = session.run(every, fed)
    except Exception as error:  # onnxruntime's errors share no class but this
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"bisect: ONNX Runtime does not run '{model.name}': {first}") from error
    values = {
        name: torch.from_numpy(value) for name, value in zip(every, given, strict=True) if hasattr(value, "dtype")
    }
    return plain, _Order(nodes, outputs), values


class _Sorted:
    """Values by the number of their numbers, sorted."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.held: dict[int, list[Tensor]] = {}
        for value in values:
            if _counts(value):
                self.held.setdefault(value.numel(), []).append(_line(value))

    def gap(self, value: Any) -> float | None:
        """How near the nearest comes; None where none has as many numbers, or the value is no sum of any."""
        if not _counts(value):
            return None
        others = self.held.get(value.numel(), [])
        return min((_gap(_line(value), other) for other in others), default=None)


def _line(value: Tensor) -> Tensor:
    return value.double().flatten().sort().values


def _counts(value: Any) -> bool:
    """Whether a value has numbers to compare: a handful of small ones would be alike by chance."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 3


def _gap(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    a, b = (torch.nan_to_num(t.double(), posinf=1e30, neginf=-1e30, nan=2e30) for t in (wanted, found))
    return float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)


def _ancestors(program: Program) -> set[fx.Node]:
    """What the outputs rest on."""
    found: set[fx.Node] = set()
    left: list[fx.Node] = list(program.graph.output_node().all_input_nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _module_of(node: fx.Node) -> str:
    stack: Sequence[Any] = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""
