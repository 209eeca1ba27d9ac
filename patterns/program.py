"""`Program`: a captured model as a functional ATen graph that runs, prints and knows its weights by their original names."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from recast.patterns.derivation import Derivation
from recast.patterns.errors import CaptureError
from recast.patterns.printer import program_text

__all__ = [
    "Interface",
    "Program",
    "fixed_size",
    "get_by_path",
    "graph_module",
    "set_by_path",
    "tensor_digest",
    "with_code",
]


@dataclasses.dataclass(frozen=True)
class Interface:
    """How a program is called, and what it gives back.

    Parameters
    ----------
    parameters
        Names of the parameters of the model's ``forward``, in order; empty when not known.
    args
        Names under which the positional arguments were captured.
    kwargs
        Names of the keyword arguments, in captured order.
    in_spec, out_spec
        Pytree structure of ``(args, kwargs)`` and of the result.
    constants
        Flat inputs that were not tensors (flags, ``None``), by position: the program holds for these values only.
    mutations
        ``(output position, "weight" or "input", name)`` of results that are copied back (KV caches, running statistics).
    """

    parameters: tuple[str, ...]
    args: tuple[str, ...]
    kwargs: tuple[str, ...]
    in_spec: Any
    out_spec: Any
    constants: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    mutations: tuple[tuple[int, str, str], ...] = ()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Arrange a call the way the model was captured, whether arguments come by position or by name."""
        given: dict[str, Any] = {}
        positional = self.parameters or self.args
        if len(args) > len(positional) and not (len(args) == len(self.args) and not kwargs):
            raise TypeError(
                f"program takes {len(positional)} positional arguments {positional}, {len(args)} were given"
            )
        if len(args) == len(self.args) and set(kwargs) == set(self.kwargs):
            return self._leaves(args, {name: kwargs[name] for name in self.kwargs})
        for name, value in zip(positional, args, strict=False):
            given[name] = value
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"program got several values for argument '{name}'")
            given[name] = value
        wanted = (*self.args, *self.kwargs)
        extra = [name for name, value in given.items() if name not in wanted and value is not None]
        missing = [name for name in wanted if name not in given]
        if extra or missing:
            raise TypeError(
                f"program was captured with arguments {list(wanted)}; "
                + (f"not given: {missing}; " if missing else "")
                + (f"given besides: {extra}; " if extra else "")
                + "capture it again with the arguments you mean to use"
            )
        return self._leaves(tuple(given[n] for n in self.args), {n: given[n] for n in self.kwargs})

    def leaf_names(self) -> list[str]:
        """What a caller calls each flat input: the argument's name, with its place where the argument holds several.

        Examples
        --------
        >>> import torch, recast
        >>> class Sum(torch.nn.Module):
        ...     def forward(self, x, others):
        ...         return x + others["a"] + others["b"]
        >>> x = torch.ones(2)
        >>> recast.capture(Sum(), (x, {"a": x, "b": x})).interface.leaf_names()
        ['x', "others['a']", "others['b']"]
        """
        if self.in_spec.num_children != 2:  # not of `(args, kwargs)`, as in programs made by hand
            return []
        found: list[str] = []
        for names, spec in zip((self.args, self.kwargs), self.in_spec.children(), strict=True):
            for name, child in zip(names, spec.children(), strict=False):
                found += _leaf_names(name, child)
        return found if len(found) == self.in_spec.num_leaves else []

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        try:  # by structure: dictionaries may come with their keys in another order
            leaves = self.in_spec.flatten_up_to((args, kwargs))
            fits = all(pytree.tree_structure(leaf).is_leaf() for leaf in leaves)
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise TypeError(
                f"program was captured with inputs of structure {_structure_text(self.in_spec)}, "
                f"{_structure_text(pytree.tree_structure((args, kwargs)))} were given"
            )
        for position, value in self.constants.items():
            given = leaves[position]
            if isinstance(given, Tensor) or type(given) is not type(value) or given != value:
                shown = "a tensor" if isinstance(given, Tensor) else repr(given)
                raise TypeError(
                    f"input {position} was the constant {value!r} at capture and is {shown} now; "
                    "capture again with this value"
                )
        return list(leaves)


def _leaf_names(name: str, spec: Any) -> list[str]:
    if spec.is_leaf():
        return [name]
    keys = spec.context if spec.type is dict else range(spec.num_children)
    parts = zip(keys, spec.children(), strict=True)
    return [leaf for key, part in parts for leaf in _leaf_names(f"{name}[{key!r}]", part)]


def _structure_text(spec: Any) -> str:
    return " ".join(str(pytree.treespec_pprint(spec)).split())


@dataclasses.dataclass
class Program:
    """A captured model: a functional ATen graph with its weights by original name. Called like the model.

    Parameters
    ----------
    module
        Graph module: a placeholder for each flat input, ``get_attr`` for weights, a tuple of flat results.
    interface
        Calling convention.
    aliases
        Further names of weights that share storage, as ``{other name: name in the graph}``.
    door
        ``"export"`` or ``"dynamo"``.
    training
        Whether the model was in training mode; lossy passes refuse such a program.
    label
        A human name, used in reports.
    notes
        What capture had to decide on the way, in words.
    derived
        For each weight that an exact rewrite made, under an old name or a new one: what it is of the original ones.
    dropped
        Original weights that nothing needs any more, with the reason.
    rewrites
        What `recast.simplify` did and refused, if it was run.
    decoder
        Of a decoder captured with its cache, what a generation loop has to know: layers, heads, tokens that end a text.
    """

    module: fx.GraphModule
    interface: Interface
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    door: str = "export"
    training: bool = False
    label: str = "program"
    notes: list[str] = dataclasses.field(default_factory=list)
    report: Any = None
    plan: Any = None
    derived: dict[str, Derivation] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    rewrites: Any = None
    decoder: dict[str, Any] | None = None
    memory: dict[Hashable, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor the graph reads through ``get_attr``, by original name, in graph order, once."""
        found: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in found:
                value = get_by_path(self.module, node.target)
                if isinstance(value, Tensor):
                    found[node.target] = value
        return found

    def originals_of(self, name: str) -> tuple[str, ...]:
        """Names of the captured model's weights that a weight of this program is made of."""
        return self.derived[name].sources if name in self.derived else (name,)

    def successors_of(self, name: str) -> tuple[str, ...]:
        """Names of this program's weights that an original weight went into; empty if nothing needs it any more."""
        name = self.aliases.get(name, name)
        held = self.weights
        kept = (name,) if name in held and name not in self.derived else ()
        return kept + tuple(new for new, made in self.derived.items() if name in made.sources and new in held)

    def inputs(self) -> list[fx.Node]:
        """Placeholders in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def run_flat(self, leaves: list[Any]) -> list[Any]:
        """Run on flat inputs; give flat results after copying mutated values back."""
        return self.finish(list(self.module(*leaves)), leaves)

    def finish(self, results: list[Any], leaves: list[Any]) -> list[Any]:
        """Copy mutated values back where the model keeps them, and give the rest."""
        for position, kind, name in self.interface.mutations:
            target = get_by_path(self.module, name) if kind == "weight" else leaves[self._input_position(name)]
            with torch.no_grad():
                target.copy_(results[position])
        return self.outputs(results)

    def outputs(self, results: list[Any]) -> list[Any]:
        """Those of the flat results that the model gives, without the mutated values."""
        mutated = {position for position, _, _ in self.interface.mutations}
        return [value for i, value in enumerate(results) if i not in mutated]

    def _input_position(self, name: str) -> int:
        return [node.name for node in self.inputs()].index(name)

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Flat inputs of a call, checked against the captured shapes."""
        leaves = self.interface.flatten(args, kwargs)
        self._check(leaves)
        return leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the model's own arguments; gives what the model gives."""
        results = self.run_flat(self.flatten(*args, **kwargs))
        return pytree.tree_unflatten(results, self.interface.out_spec)

    def _check(self, leaves: list[Any]) -> None:
        sizes: dict[str, tuple[Any, str]] = {}
        nodes = self.inputs()
        names = self.interface.leaf_names() or [node.name for node in nodes]
        for node, name, value in zip(nodes, names, leaves, strict=True):
            expected = node.meta.get("val")
            if not isinstance(expected, Tensor):
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"input '{name}' must be a tensor like {shape_text(expected)}, not {kind}")
            fits = expected.ndim == value.ndim and expected.dtype == value.dtype
            for wanted, given in zip(expected.shape, value.shape, strict=False):
                if (fixed := fixed_size(wanted)) is not None:
                    fits = fits and fixed == given
                    continue
                known, where = sizes.setdefault(str(wanted), (given, name))
                if known != given and isinstance(known, int) and isinstance(given, int):
                    raise TypeError(
                        f"inputs '{where}' and '{name}' share the size {wanted}; {known} and {given} were given"
                    )
            if not fits:
                raise TypeError(
                    f"input '{name}' was captured as {shape_text(expected)}, a {shape_text(value)} was given; "
                    "capture with dynamic_shapes, or with the shapes and dtypes you mean to use"
                )

    def copy(self) -> Program:
        """A program with a graph of its own and the same weight tensors (nothing large is copied)."""
        held = {
            str(node.target): get_by_path(self.module, str(node.target))
            for node in self.graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {}, return_output_node=True)
        assert isinstance(output, tuple)
        graph.output(output[0])
        graph.find_nodes(op="output")[0].meta = dict(output[1].meta)
        return dataclasses.replace(
            self,
            module=graph_module(held, graph),
            aliases=dict(self.aliases),
            notes=list(self.notes),
            derived=dict(self.derived),
            dropped=dict(self.dropped),
        )

    def fingerprint(self) -> str:
        """Identify the model: operations, weight names, shapes, dtypes and a sample of the values; 16 hex digits."""
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            if node.op == "call_function":
                digest.update(_operation_name(node.target).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            if weight.untyped_storage().nbytes():  # released weights are known by name and shape only
                digest.update(tensor_digest(weight, sample=4096).encode())
        return digest.hexdigest()[:16]

    def nbytes(self) -> int:
        """Bytes of all weights and of the operators that replaced some, each storage counted once."""
        held: dict[int, tuple[int, dict[tuple[Any, ...], int]]] = {}
        for tensor in self.storages():
            storage = tensor.untyped_storage()
            _, views = held.setdefault(storage._cdata, (storage.nbytes(), {}))
            views[tensor.storage_offset(), tuple(tensor.shape), tensor.stride()] = (
                tensor.numel() * tensor.element_size()
            )
        # A view of a larger storage holds no more than what it shows; a released storage holds nothing.
        return sum(min(size, sum(views.values())) for size, views in held.values())

    def storages(self) -> Iterator[Tensor]:
        """All tensors the program needs to run."""
        yield from self.weights.values()
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield from self.module.get_submodule(node.target).state_dict().values()

    def __str__(self) -> str:
        return program_text(self)

    def __repr__(self) -> str:
        return f"<Program {self.label}: {len(self.graph.nodes)} nodes, {len(self.weights)} weights, door {self.door}>"


def _operation_name(target: Any) -> str:
    """The same in every process: the text of a plain function would tell where it lies in memory."""
    return f"{target.__module__}.{target.__qualname__}" if hasattr(target, "__code__") else str(target)


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph with what it reads, from a module or by path; its code is made when it first runs, which most never do."""
    return _LazyGraphModule(root, graph, "Program")


def with_code(module: fx.GraphModule) -> fx.GraphModule:
    """The same module with its code made, as dynamo wants it, which cannot trace the making."""
    _LazyGraphModule.force_recompile(module)
    return module


def fixed_size(size: Any) -> int | None:
    """A size that tracing settled on, though it may have begun as a symbol; None if it is free."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def shape_text(tensor: Tensor) -> str:
    """Dtype and shape in short: ``float32[2, 5, 8]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in tensor.shape)}]"


def get_by_path(root: nn.Module, path: str) -> Any:
    """Attribute at a dotted path.

    Examples
    --------
    >>> import torch
    >>> get_by_path(torch.nn.Sequential(torch.nn.Linear(2, 3)), "0.weight").shape
    torch.Size([3, 2])
    """
    value: Any = root
    for part in path.split("."):
        if isinstance(value, nn.Module) and part in value._modules:  # far faster than asking for an attribute
            value = value._modules[part]
            continue
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise CaptureError(
                f"'{path}' is named in the graph but not held by the program ('{part}' is missing)"
            ) from error
    return value


def set_by_path(root: nn.Module, path: str, value: Any) -> None:
    """Attach a tensor or module at a dotted path, making empty modules on the way."""
    *parents, last = path.split(".")
    module = root
    for part in parents:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            setattr(module, part, child)
        module = child
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(last, value)
    else:
        setattr(module, last, value)


def tensor_digest(tensor: Tensor, sample: int | None = None) -> str:
    """SHA-256 of a tensor's dtype, shape and values (all of them, or an even sample), as hex."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    if sample is not None and flat.numel() > sample:
        # A view, so that nothing is gathered. An odd step wanders over the columns where their number is even.
        flat = flat[:: (flat.numel() // sample) | 1]
    # Copies, a piece at a time: a storage that was once shown to numpy can no longer be released (resized).
    for piece in flat.split(1 << 22):  # type: ignore[no-untyped-call]
        digest.update(piece.to("cpu", copy=True).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
