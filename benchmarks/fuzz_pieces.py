"""Programs put together from captured pieces: what exporting a whole model gives, in a fraction of the time.

Each block of a model is captured once a spelling and memory layout, its linears apart from it; a program of many blocks is
their graphs one after the other, every value with the shape that it has there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.fuzz_programs import WIDTH, Linear, Model
from recast.passes.meta import Evaluator
from recast.patterns.capture.export import capture
from recast.patterns.linear.packing import size_hint
from recast.patterns.program import Program, get_by_path, set_by_path

__all__ = ["Pieces", "keep_as_result"]

aten = torch.ops.aten

Key = tuple[Any, ...]
TOGETHER = 40  # pieces exported in one go: a call of torch.export costs as much as a dozen operations
_LIES_ACROSS = ("conv", "left")  # spellings of a linear whose result is a transposed view


class _Through(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class _Several(nn.Module):
    """Modules side by side, each with an input of its own."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(modules)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [piece(x) for piece, x in zip(self.pieces, xs, strict=True)]


@dataclasses.dataclass
class _Wanted:
    """A module to be captured with an input of some features, in some layout."""

    module: nn.Module
    features: int
    layout: tuple[int, ...]


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

    def prepare(self, models: Iterable[Model]) -> None:
        """Capture what models will need, many pieces at a time; what is overlooked is captured when it is met."""
        wanted: dict[Key, _Wanted] = {}
        for model in models:
            layout: tuple[int, ...] = _STRAIGHT
            for block, residual in zip(model.blocks, model.residual, strict=True):
                result = self._want(wanted, block, layout)
                layout = layout if residual else result
        keys = list(wanted)
        for start in range(0, len(keys), TOGETHER):
            self._capture({key: wanted[key] for key in keys[start : start + TOGETHER]})

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

    def _want(self, wanted: dict[Key, _Wanted], module: nn.Module, layout: tuple[int, ...]) -> tuple[int, ...]:
        """Note a module and its linears unless they are known; gives how the result will lie in memory, or a guess."""
        key, last = _key(module, layout), module
        for slot in _slots(module):
            last = getattr(module, slot)
            self._want(wanted, last, _STRAIGHT if slot in ("o", "down") else layout)
        if key not in self._known:
            features = module.n if isinstance(module, Linear) else WIDTH
            wanted[key] = _Wanted(module, features, _STRAIGHT if _slots(module) else layout)
        return _ACROSS if getattr(last, "spelling", "") in _LIES_ACROSS else _STRAIGHT

    def _put(self, draft: _Draft, module: nn.Module, prefix: str, x: fx.Node) -> fx.Node:
        value = x.meta["val"]
        key = _key(module, _layout(value))
        if key not in self._known:
            self._capture({key: _Wanted(module, value.shape[-1], _layout(value))})
        piece, slots = self._known[key], _slots(module)
        placed: dict[fx.Node, fx.Node] = {}
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
            elif node.target is aten.sym_size.int and first.op == "placeholder":
                dimension: Any = node.args[1]
                placed[node] = draft.size(dimension)
            else:
                placed[node] = draft.graph.node_copy(node, lambda n: placed[n])
                placed[node].meta = {**node.meta, "val": piece.values[node]}
        return placed[piece.result]

    def _capture(self, wanted: dict[Key, _Wanted]) -> None:
        skeletons, examples = [], []
        for one in wanted.values():
            skeleton = copy.deepcopy(one.module)
            for slot in _slots(one.module):
                whole = getattr(one.module, slot)
                setattr(skeleton, slot, nn.Linear(whole.n, whole.m, bias=False))
            skeletons.append(skeleton)
            sizes = [(2, 5, one.features)[d] for d in one.layout]
            examples.append(torch.randn(sizes).permute([one.layout.index(d) for d in range(3)]))
        whole = capture(_Several(skeletons).eval(), (examples,))
        (output,) = whole.graph.find_nodes(op="output")
        order = {node: i for i, node in enumerate(whole.graph.nodes)}
        (given,) = self._base.inputs()
        for i, (key, one) in enumerate(wanted.items()):
            result = output.args[0][i]
            inside, queue = {result}, [result]
            while queue:
                new = [n for n in queue.pop().all_input_nodes if n not in inside]
                inside.update(new)
                queue += new
            nodes = sorted(inside, key=order.__getitem__)
            x = self._example(given.meta["val"], one)
            values = self._evaluate(whole, nodes, x)
            self._known[key] = _Piece(nodes, result, whole.module, f"pieces.{i}.", values)

    def _example(self, x: Any, one: _Wanted) -> Any:
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


def _slots(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, Linear)]


def _slot_of(node: fx.Node, slots: list[str], prefix: str) -> str | None:
    """The slot whose place an operation holds."""
    if node.target is not aten.linear.default:
        return None
    name, _, last = str(node.args[1].target).removeprefix(prefix).rpartition(".")  # type: ignore[union-attr]
    return name if name in slots and last == "weight" else None


def _key(module: nn.Module, layout: tuple[int, ...]) -> Key:
    """What tells one piece from another: the spelling, and how x lies in memory unless it enters linears alone."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str) and not k.startswith("_")}
    named = {k: v.__name__ for k, v in vars(module).items() if callable(v) and hasattr(v, "__name__")}
    slots = _slots(module)
    held = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=not slots)}
    sizes = [(slot, getattr(module, slot).n, getattr(module, slot).m) for slot in slots]
    return (type(module).__name__, *sorted((plain | named | held).items()), *sizes, *(() if slots else (layout,)))


_STRAIGHT, _ACROSS = (0, 1, 2), (0, 2, 1)


def _layout(value: Any) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost."""
    strides = [size_hint(stride) for stride in value.stride()]
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
