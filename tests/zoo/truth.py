"""What a model is made of, seen while it runs in eager mode and not by the patterns that are to be judged by it.

A `TorchDispatchMode` sees every operation below autograd: which products have a parameter as an operand, which softmax is
taken over scores that come from a product of two activations, which top-k chooses among experts. Norms are modules whose class
is called so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "linear",
    "_grouped_mm",
    "grouped_mm_fallback",
    "addmm_",
}
_FIRST_OPERAND = {"addmm": 1, "baddbmm": 1, "addmv": 1, "addmm_": 1}
_CONVOLUTIONS = {"convolution", "_convolution"}
_FUSED = re.compile(r"_?scaled_dot_product_\w*attention\w*")
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
_CHOICES = {"topk", "argmax", "sort"}
_SELECT = {"index", "index_select", "gather", "embedding"}
_FORGET = {"native_layer_norm", "_fused_rms_norm", "native_group_norm", "arange", "full"}
_NORM = re.compile(r"\w*Norm(Gated|\dd|1P)?")
_NOT_NORM = re.compile(r"NoNorm|\w*BatchNorm\w*|InstanceNorm\w*|WeightNorm\w*")


@dataclasses.dataclass
class Matrix:
    """A parameter that activations are multiplied by."""

    name: str
    shape: tuple[int, ...]
    paths: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def parameters(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass
class Routed:
    """A layer whose tokens each visit some of its experts."""

    path: str
    experts: int
    parameters: tuple[str, ...]


@dataclasses.dataclass
class Truth:
    """What was seen.

    Parameters
    ----------
    matrices
        By parameter name.
    attention
        Module path to how often scores were normalised there.
    routed
        By path of the module that holds the experts.
    norms
        Module path to class name.
    """

    matrices: dict[str, Matrix] = dataclasses.field(default_factory=dict)
    attention: Counter[str] = dataclasses.field(default_factory=Counter)
    routed: dict[str, Routed] = dataclasses.field(default_factory=dict)
    norms: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return sum(m.parameters for m in self.matrices.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "matrices": {n: list(m.shape) for n, m in self.matrices.items()},
            "attention": dict(self.attention),
            "moe": {p: r.experts for p, r in self.routed.items()},
            "norms": dict(self.norms),
        }


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Truth, Any]:
    """Run a model once and say what it is made of; the result of the run comes second."""
    watch = _Watch(model)
    with torch.no_grad(), _paths(model, watch), watch:
        result = model(*args, **kwargs)
    watch.finish([t for t in _leaves(result) if isinstance(t, Tensor)])
    return watch.truth, result


def _leaves(result: Any) -> list[Any]:
    return [
        inner
        for leaf in pytree.tree_leaves(result)
        for inner in (vars(leaf).values() if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) else [leaf])
    ]


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.truth = Truth()
        self.path: list[str] = [""]
        self.model = model
        self.parameters = dict(model.named_parameters())
        # What a model computes of parameters and buffers alone is no product with an activation.
        held = {**dict(model.named_buffers()), **self.parameters}
        self.by_storage = {t.untyped_storage().data_ptr(): n for n, t in held.items() if t.numel()}
        self.modules = dict(model.named_modules())
        self.weights: dict[int, frozenset[str]] = {}  # of values that are functions of parameters: which
        self.scores: set[int] = set()  # values that come from a product of two activations

        # What was seen counts only if a result of the model depends on it: a pooler nobody asked is in no graph either.
        self.norm: dict[str, str] = {}
        self.events: list[tuple[int, Callable[[], None]]] = []
        self.needs: list[set[int]] = []  # of every operation: those whose results it reads
        self.made: dict[int, int] = {}  # by which operation a value was made, a storage last written
        self.written: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._depend(func, args, kwargs, result)
        name = func._schema.name.split("::")[1]
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        sources = [self._sources(t) for t in tensors]
        if name in _PRODUCTS or (name in _CONVOLUTIONS and all(size == 1 for size in tensors[1].shape[2:])):
            first = _FIRST_OPERAND.get(name, 0)
            pair = sources[first : first + 2]
            if len(pair) == 2 and bool(pair[0]) != bool(pair[1]):
                if name not in _CONVOLUTIONS or args[8] == 1:
                    self._product(pair[0] or pair[1])
            elif len(pair) == 2 and not pair[0] and name not in _CONVOLUTIONS:
                self._mark(outputs)
        elif _FUSED.fullmatch(name) and name != "scaled_dot_product_attention":
            self._attention(self.path[-1])
        elif name in _SOFTMAX:
            if id(tensors[0]) in self.scores:
                self._attention(self.path[-1])
        else:
            if name in _CHOICES:
                self._choice(tensors[0])
            if name not in _FORGET and name not in _CONVOLUTIONS and any(id(t) in self.scores for t in tensors):
                self._mark(outputs)
        self._derive(name, sources, tensors, outputs)
        return result

    def _depend(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        number = len(self.needs)
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.needs.append({n for t in read for n in self._makers(t)})
        for output in pytree.tree_leaves(result):
            if isinstance(output, Tensor):
                self.made[id(output)] = number
                weakref.finalize(output, self.made.pop, id(output), None)
        if func._schema.is_mutable:
            self.written[read[0].untyped_storage().data_ptr()] = number
            self.made[id(read[0])] = number

    def _makers(self, tensor: Tensor) -> list[int]:
        found = (self.made.get(id(tensor)), self.written.get(tensor.untyped_storage().data_ptr()))
        return [number for number in found if number is not None]

    def _see(self, event: Callable[[], None]) -> None:
        self.events.append((len(self.needs) - 1, event))

    def finish(self, results: list[Tensor]) -> None:
        """Keep what results depend on."""
        live: set[int] = set()
        waiting = [number for result in results for number in self._makers(result)]
        while waiting:
            number = waiting.pop()
            if number not in live:
                live.add(number)
                waiting += self.needs[number]
        for number, event in self.events:
            if number in live:
                event()

    def _sources(self, tensor: Tensor) -> frozenset[str]:
        """Parameters that a value is a function of, if of them alone."""
        if (known := self.weights.get(id(tensor))) is not None:
            return known
        name = self.by_storage.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        return frozenset([name]) if name is not None else frozenset()

    def _derive(self, name: str, sources: list[frozenset[str]], tensors: list[Tensor], outputs: list[Tensor]) -> None:
        if not sources or (not sources[0] and len(sources) < 2):
            return
        chosen = name in _SELECT and sources[0] and tensors[0].ndim >= 3  # an expert's matrices, by its number
        if chosen or all(sources):
            of = sources[0] if chosen else frozenset().union(*sources)
            for output in outputs:
                if self.by_storage.get(output.untyped_storage().data_ptr()) is None:
                    self.weights[id(output)] = of
                    self._forget(output)

    def constant(self, value: Tensor) -> bool:
        """Whether a value is a function of parameters and buffers alone."""
        return bool(self._sources(value))

    def note_norm(self, path: str, kind: str) -> None:
        """A norm has just been computed."""
        self._see(lambda: self.truth.norms.setdefault(path, kind) and None)

    def _attention(self, path: str) -> None:
        self._see(lambda: self.truth.attention.update([path]))

    def _mark(self, outputs: list[Tensor]) -> None:
        for output in outputs:
            self.scores.add(id(output))
            self._forget(output)

    def _forget(self, tensor: Tensor) -> None:
        """Drop what is known of a value when it goes: its address will be another's."""
        key = id(tensor)

        def gone() -> None:
            self.scores.discard(key)
            self.weights.pop(key, None)

        weakref.finalize(tensor, gone)

    def _product(self, sources: frozenset[str]) -> None:
        path = self.path[-1]

        def event() -> None:
            for name in sources:
                parameter = self.parameters.get(name)
                if parameter is not None and parameter.ndim >= 2:
                    matrix = self.truth.matrices.setdefault(name, Matrix(name, tuple(parameter.shape)))
                    matrix.paths[path] += 1

        self._see(event)

    def _choice(self, scores: Tensor) -> None:
        """A choice among something: is there a module near that holds as many experts?"""
        size = scores.numel() and scores.shape[-1]
        if size < 2:
            return
        steps = self.path[-1].split(".") if self.path[-1] else []
        for up in range(min(3, len(steps)) + 1):
            prefix = ".".join(steps[: len(steps) - up])
            if (found := self._experts(prefix)) is not None:
                self._see(lambda: self.truth.routed.setdefault(found.path, found) and None)
                return

    def _experts(self, prefix: str) -> Routed | None:
        start = prefix + "." if prefix else ""
        for path, module in self.modules.items():
            if not (path == prefix or path.startswith(start)) or "expert" not in path.removeprefix(start).lower():
                continue
            if path.count(".") > prefix.count(".") + 3 or "shared" in path.removeprefix(start):
                continue
            own = {f"{path}.{n}": p for n, p in module.named_parameters(recurse=False) if p.ndim >= 3}
            if own:
                # A stack may be longer than the others, with room for experts that compute nothing.
                return Routed(path, min(p.shape[0] for p in own.values()), tuple(own))
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
                inner = tuple(f"{path}.{n}" for n, p in module.named_parameters() if p.ndim >= 2)
                # An activation may stand beside the experts.
                return Routed(path, len({name[len(path) + 1 :].partition(".")[0] for name in inner}), inner)
        return None


@contextlib.contextmanager
def _paths(model: nn.Module, watch: _Watch) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, _: Any, path: str = path) -> None:
            watch.path.append(path)
            kind = type(module).__name__
            if _NORM.fullmatch(kind) and not _NOT_NORM.fullmatch(kind) and getattr(module, "weight", None) is not None:
                watch.norm[path] = kind

        def leave(module: nn.Module, given: Any, result: Any) -> None:
            path = watch.path.pop()
            # Its last operation gives its result. A norm of weights alone is a weight.
            if path in watch.norm and not (isinstance(result, Tensor) and watch.constant(result)):
                kind = watch.norm[path]
                watch.note_norm(path, kind)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
