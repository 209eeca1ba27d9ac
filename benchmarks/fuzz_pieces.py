"""Programs put together from captured pieces: what exporting a whole model gives, in a fraction of the time.

Each block of a model is captured once a spelling and memory layout, its linears apart from it; a program of many blocks is
their graphs one after the other, every value with the shape that it has there.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.fuzz_capture import (
    ACROSS,
    STRAIGHT,
    Key,
    Wanted,
    captured,
    keep,
    kept,
    key_of,
    layout_of,
    read,
    slots_of,
)
from benchmarks.fuzz_programs import WIDTH, Linear, Model
from recast.passes.meta import Evaluator
from recast.patterns.capture.export import capture
from recast.patterns.program import Program, get_by_path, set_by_path

__all__ = ["Pieces", "keep_as_result"]

aten = torch.ops.aten

TOGETHER = 20  # pieces exported in one go: a call of torch.export costs as much as a dozen operations
_LIES_ACROSS = ("conv", "left")  # spellings of a linear whose result is a transposed view


class _Through(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


@dataclasses.dataclass
class _Piece:
    """The operations of a captured module in order, and what their values are in symbols of the whole."""

    nodes: list[fx.Node]
    result: fx.Node
    held: nn.Module
    prefix: str
    values: dict[fx.Node, Any]


@dataclasses.dataclass
class _Draft:
    """A graph in the making."""

    graph: fx.Graph
    root: nn.Module
    x: fx.Node
    sizes: dict[int, fx.Node] = dataclasses.field(default_factory=dict)

    def size(self, dimension: int) -> fx.Node:
        """A size of the input, read once, at the beginning."""
        if dimension not in self.sizes:
            last = max((self.x, *self.sizes.values()), key=lambda n: list(self.graph.nodes).index(n))
            with self.graph.inserting_after(last):
                node = self.graph.call_function(aten.sym_size.int, (self.x, dimension))
            node.meta["val"] = self.x.meta["val"].shape[dimension]
            self.sizes[dimension] = node
        return self.sizes[dimension]


class Pieces:
    """Captured pieces by spelling; `program` puts those of a model together."""

    def __init__(self) -> None:
        self._base = capture(_Through().eval(), (torch.randn(2, 5, WIDTH),))
        self._evaluator = Evaluator(self._base)
        self._known: dict[Key, _Piece] = {}

    def prepare(self, models: Iterable[Model], folder: Path, processes: int = 1) -> None:
        """Capture what models will need, many pieces at a time; what is overlooked is captured when it is met.

        Captured programs are put into the folder, and taken from there by whoever wants the same pieces.
        """
        wanted: dict[Key, Wanted] = {}
        for model in models:
            layout: tuple[int, ...] = STRAIGHT
            for block, residual in zip(model.blocks, model.residual, strict=True):
                result = self._want(wanted, block, layout)
                layout = layout if residual else result
        known = {name for names in kept(folder).values() for name in names}
        keys = [key for key in wanted if repr(key) not in known]
        groups = [{key: wanted[key] for key in keys[i : i + TOGETHER]} for i in range(0, len(keys), TOGETHER)]
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            pool.starmap(keep, [(group, folder) for group in groups], chunksize=1)
        named = {repr(key): (key, one) for key, one in wanted.items()}
        for file, names in kept(folder).items():
            if any(name in named for name in names):
                self._take([named.get(name) for name in names], read(file))

    def program(self, model: Model) -> Program:
        """The program of a model; its weights are the model's own."""
        graph, root = fx.Graph(), nn.Module()
        (given,) = self._base.inputs()
        x = graph.node_copy(given)
        draft = _Draft(graph, root, x)
        kept = []
        for i, (block, residual) in enumerate(zip(model.blocks, model.residual, strict=True)):
            y = self._put(draft, block, f"blocks.{i}", x)
            if residual:
                before, x = x, graph.call_function(aten.add.Tensor, (x, y))
                known = {n: n.meta["val"] for n in (before, y)}
                x.meta["val"] = self._evaluator.value(x, known)
            else:
                x = y
            if i == model.extra:
                kept.append(y)
        results = (x, *kept)
        graph.output(results)
        graph.lint()
        interface = dataclasses.replace(self._base.interface, out_spec=pytree.tree_structure((0,) * len(results)))
        return Program(fx.GraphModule(root, graph, "Program"), interface, label="Model")

    def _want(self, wanted: dict[Key, Wanted], module: nn.Module, layout: tuple[int, ...]) -> tuple[int, ...]:
        """Note a module and its linears unless they are known; gives how the result will lie in memory, or a guess."""
        key, last = key_of(module, layout), module
        for slot in slots_of(module):
            last = getattr(module, slot)
            self._want(wanted, last, STRAIGHT if slot in ("o", "down") else layout)
        if key not in self._known:
            features = module.n if isinstance(module, Linear) else WIDTH
            wanted[key] = Wanted(module, features, STRAIGHT if slots_of(module) else layout)
        return ACROSS if getattr(last, "spelling", "") in _LIES_ACROSS else STRAIGHT

    def _put(self, draft: _Draft, module: nn.Module, prefix: str, x: fx.Node) -> fx.Node:
        value = x.meta["val"]
        key = key_of(module, layout_of(value))
        if key not in self._known:
            one = {key: Wanted(module, value.shape[-1], layout_of(value))}
            self._take(list(one.items()), captured(one))
        piece, slots = self._known[key], slots_of(module)
        placed: dict[fx.Node, fx.Node] = {}
        moved: set[fx.Node] = set()  # what lies otherwise in memory than where the piece was captured
        for node in piece.nodes:
            first: Any = node.args[0] if node.args else None
            name = str(node.target).removeprefix(piece.prefix)
            if node.op == "placeholder":
                placed[node] = x
            elif node.op == "get_attr":
                if name.split(".")[0] in slots:
                    continue
                own = str(node.target).startswith(piece.prefix)
                held = get_by_path(module, name) if own else get_by_path(piece.held, str(node.target))
                set_by_path(draft.root, f"{prefix}.{name}", held)
                placed[node] = draft.graph.get_attr(f"{prefix}.{name}")
                placed[node].meta = {**node.meta, "val": piece.values[node]}
            elif (slot := _slot_of(node, slots, piece.prefix)) is not None:
                placed[node] = self._put(draft, getattr(module, slot), f"{prefix}.{slot}", placed[first])
                if _strides(placed[node].meta["val"]) != _strides(piece.values[node]):
                    moved.add(node)
            elif node.target is aten.sym_size.int and first.op == "placeholder":
                dimension: Any = node.args[1]
                placed[node] = draft.size(dimension)
            else:
                copied = placed[node] = draft.graph.node_copy(node, lambda n: placed[n])
                copied.meta = {**node.meta, "val": piece.values[node]}
                if not moved.isdisjoint(node.all_input_nodes):
                    copied.meta["val"] = self._moved(draft.graph, copied)
                    if _strides(copied.meta["val"]) != _strides(piece.values[node]):
                        moved.add(node)
        return placed[piece.result]

    def _moved(self, graph: fx.Graph, node: fx.Node) -> Any:
        """What a value is where operands lie otherwise in memory; what can no longer be viewed is copied before, as capture does."""
        try:
            return self._evaluator.value(node)
        except (RuntimeError, ValueError):
            operand = node.args[0]
            if node.target is not aten.view.default or not isinstance(operand, fx.Node):
                raise
            with graph.inserting_before(node):
                straight = graph.call_function(
                    aten.clone.default, (operand,), {"memory_format": torch.contiguous_format}
                )
            straight.meta["val"] = self._evaluator.value(straight)
            node.update_arg(0, straight)
            return self._evaluator.value(node)

    def _take(self, wanted: Sequence[tuple[Key, Wanted] | None], whole: Program) -> None:
        """Take the pieces that are wanted out of a program of several."""
        (output,) = whole.graph.find_nodes(op="output")
        order = {node: i for i, node in enumerate(whole.graph.nodes)}
        (given,) = self._base.inputs()
        for i, asked in enumerate(wanted):
            if asked is None:
                continue
            (key, one), result = asked, output.args[0][i]
            inside, queue = {result}, [result]
            while queue:
                new = [n for n in queue.pop().all_input_nodes if n not in inside]
                inside.update(new)
                queue += new
            nodes = sorted(inside, key=order.__getitem__)
            x = self._example(given.meta["val"], one)
            values = self._evaluate(whole, nodes, x)
            self._known[key] = _Piece(nodes, result, whole.module, f"pieces.{i}.", values)

    def _example(self, x: Any, one: Wanted) -> Any:
        """An input of the whole's batch and tokens, with the features and layout of a piece."""
        sizes = [(*x.shape[:2], one.features)[d] for d in one.layout]
        with self._evaluator.mode:
            return torch.empty(sizes).permute([one.layout.index(d) for d in range(3)])

    def _evaluate(self, whole: Program, nodes: list[fx.Node], x: Any) -> dict[fx.Node, Any]:
        """What every value of a piece is, in symbols of the whole."""
        known: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op == "placeholder":
                known[node] = x
            elif node.op == "get_attr":
                value = get_by_path(whole.module, str(node.target))
                known[node] = self._evaluator.mode.from_tensor(value, static_shapes=True)
            elif node.op == "call_function":
                known[node] = self._evaluator.value(node, known)
        return known


def keep_as_result(program: Program, position: int) -> str:
    """Make one of the values a result as well, the `position`-th modulo how many there are; gives its name."""
    (output,) = program.graph.find_nodes(op="output")
    results = output.args[0]
    able = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and node not in results
        and node.meta["val"].is_floating_point() and node.meta["val"].ndim > 2
    ]  # fmt: skip
    if not able:
        return ""
    node = able[position % len(able)]
    output.args = ((*results, node),)
    program.module.recompile()
    spec = pytree.tree_structure((0,) * (len(results) + 1))
    program.interface = dataclasses.replace(program.interface, out_spec=spec)
    return str(node.name)


def _slot_of(node: fx.Node, slots: list[str], prefix: str) -> str | None:
    """The slot whose place an operation holds."""
    if node.target is not aten.linear.default:
        return None
    name, _, last = str(node.args[1].target).removeprefix(prefix).rpartition(".")  # type: ignore[union-attr]
    return name if name in slots and last == "weight" else None


def _strides(value: Any) -> list[str]:
    return [str(stride) for stride in value.stride()] if isinstance(value, Tensor) else []
