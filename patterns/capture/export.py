"""Capture through `torch.export`: one functional ATen graph with dynamic batch and sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from recast.patterns.capture import switches
from recast.patterns.capture.canonical import canonicalise
from recast.patterns.capture.checked import check_result, copied
from recast.patterns.capture.composites import can_be_expanded, expand_composites
from recast.patterns.capture.decisions import decisions
from recast.patterns.capture.decoder import cached_forward, decoder_facts, decoder_inputs, decoder_shapes
from recast.patterns.capture.switches import Switch
from recast.patterns.errors import CaptureError
from recast.patterns.program import Interface, Program, fixed_size, graph_module, set_by_path

__all__ = ["capture", "from_exported"]

_LOG = logging.getLogger(__name__)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def capture(
    model: nn.Module | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    check: bool = True,
    cache: bool = False,
) -> Program:
    """Capture a model as a `Program`.

    Parameters
    ----------
    model
        Any `torch.nn.Module` that `torch.export` can trace (``strict=False``), or the path of an ``.onnx`` file.
    args, kwargs
        Example inputs: tensors, or nested tuples, lists, dicts of tensors; flags and ``None`` are kept as constants. For an ONNX file
        they are made from the types and names of its inputs if none are given.
    dynamic_shapes
        As `torch.export.export` takes it. By default every batch and sequence dimension that can vary is left free
        (an example batch of 1 is doubled for tracing, since `torch.export` would fix a size of 1).
    check
        Whether to run the program beside the model on the example (not in training mode, and not if it writes to its
        buffers): `torch.export` has been seen to trace something else in silence. A program of a patched or switched model
        is always checked.
    cache
        Capture a causal language model of transformers with its key-value cache as tensors, so that one program computes the
        prompt and every token after it: ``program(input_ids, attention_mask, past_key_values)`` gives ``{"logits", "present"}``,
        caches as a pair ``(key, value)`` for each layer, each (batch, heads of keys, past, features). The example needs
        ``input_ids`` only. The mask covers what is in the cache and what is new; a token's position is the number of ones before
        it, or given by ``position_ids`` if the example has them.

    Returns
    -------
    Program
        Runs like the model; weights are shared with the model, not copied.

    Raises
    ------
    CaptureError
        The model cannot be traced as one graph; the message says which operation, where, and what to try.
    ModelError
        An ONNX file is missing, damaged, too old, or reads weights from outside its folder.

    Examples
    --------
    >>> import torch
    >>> program = capture(torch.nn.Linear(8, 4).eval(), (torch.randn(3, 8),))
    >>> program(torch.randn(7, 8)).shape
    torch.Size([7, 4])
    """
    if isinstance(args, Tensor) or not isinstance(args, tuple | list):
        args = (args,)
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, str | os.PathLike):
        from recast.patterns.capture.onnx.program import capture_file  # it calls this function

        return capture_file(model, args, kwargs, dynamic_shapes, check=check)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture: a torch.nn.Module is needed, {type(model).__name__} was given; wrap the function in a module"
        )
    if cache:
        kwargs = decoder_inputs(model, args, kwargs)
        shapes = decoder_shapes(kwargs) if dynamic_shapes is None else dynamic_shapes
        with cached_forward(model) as said:
            program = _export(model, (), kwargs, shapes, check)
        program.notes[:0], program.decoder = said, decoder_facts(model, kwargs)
        return program
    given = {*kwargs, *list(inspect.signature(model.forward).parameters)[: len(args)]}
    asked = "use_cache" in given or any(kwargs.get(k) is not None for k in ("past_key_values", "past_key_value"))
    switches.known_outputs(model)
    with contextlib.ExitStack() as stack:
        said = [] if asked else stack.enter_context(switches.cache(model))
        program = _export(model, args, kwargs, dynamic_shapes, check)
    program.notes[:0] = said
    return program


@dataclasses.dataclass(frozen=True)
class _Example:
    """What to trace with, and what is lost by it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any
    note: str = ""


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, check: bool
) -> Program:
    """Trace in the first way that works: the model as it is, then with more and more of it switched."""
    example = _Example(args, kwargs, dynamic_shapes)
    examples = [example]
    if dynamic_shapes is None:
        wide_args, wide_kwargs = _double_single_batch((args, kwargs))
        fixed = "captured with the example's shapes only: a dynamic batch or sequence could not be traced"
        free = _Example(wide_args, wide_kwargs, _automatic(model, wide_args, wide_kwargs))
        examples = [free, dataclasses.replace(example, note=fixed)]
    same_batch = model.register_forward_pre_hook(_check_batches, with_kwargs=True) if dynamic_shapes is None else None
    try:
        return _first_that_works(model, examples, check)
    finally:
        if same_batch is not None:
            same_batch.remove()


def _check_batches(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the tracer that inputs which share their first size in the example always do: one batch symbol, not several."""
    first: dict[int, Any] = {}
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            size = leaf.shape[0]
            hint = size.node.hint if isinstance(size, torch.SymInt) else size
            if hint in first:
                torch._check(size == first[hint])  # type: ignore[no-untyped-call]
            first.setdefault(hint, size)


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One way to trace a model."""

    example: _Example
    ways: tuple[Switch, ...] = ()
    decided: str = ""  # which answers of the eager run are taken over: "" none, "truths", "numbers" both
    draft: bool = False  # whether torch takes branches as the example's values say, and much longer for it

    def __str__(self) -> str:
        ways = [getattr(way, "__name__", str(way)) for way in self.ways] or ["the model as it is"]
        asked = [f"{self.decided} of the example"] if self.decided else []
        return ", ".join([*ways, *asked, *["draft"] * self.draft, f"sizes {'fixed' if self.example.note else 'free'}"])


def _first_that_works(model: nn.Module, examples: list[_Example], check: bool) -> Program:
    first: Exception | None = None
    always: list[Switch] = [switches.experts, switches.unmoved]
    known = any(switches.is_transformers(m) for m in model.modules())
    patched: tuple[Switch, ...] = (switches.export_patches,) if known else ()
    # The model as it is, with free sizes and then with fixed ones; patched, if it is one that patches are known for.
    plan = [_Attempt(example, way) for example in examples for way in dict.fromkeys([(), patched])]
    later: list[_Attempt] = []
    values = False
    while plan or later:
        attempt = (plan or later).pop(0)
        try:
            exported, notes = _traced(model, attempt, always)
            example = attempt.example
            program = from_exported(exported, model, example.args, example.kwargs, notes)
            if attempt.ways or (check and not model.training and not program.interface.mutations):
                program.notes += check_result(model, program, example.args, example.kwargs)
            return program
        except Exception as error:  # noqa: BLE001  # torch raises dozens of classes here; all mean the same to the caller
            first, told = first or error, f"{type(error).__name__} {error}"
            _LOG.debug("not captured by %s: %s", attempt, told)
            if switches.outputs not in always and ("pytree-flattenable" in told or "register a pytree" in told):
                always.append(switches.outputs)
                plan.insert(0, attempt)
            elif switches.experts in always and "BF16" in told:
                # Grouped products of float32, which transformers 5.0 gives to an operation that takes bfloat16 alone.
                always[always.index(switches.experts)] = switches.gathered_experts
                plan.insert(0, attempt)
            elif "DataDependent" in told and not values:
                values = True  # fixed sizes do not help against values
                loops = (*patched, switches.every_expert)
                plan = [_Attempt(examples[0], patched)] if known and error is first else []
                plan += [_Attempt(e, loops) for e in examples]
                later = _as_it_runs(examples, loops) if known else []
            elif error is first and known:
                later = [*_as_it_runs(examples, patched), _Attempt(examples[-1], (*patched, switches.attention))]
    if isinstance(first, CaptureError):  # traced, but not what it does when it runs: says so itself
        raise first
    refused = _own_refusal(model, examples[-1])
    if refused is not None:
        raise CaptureError(refused) from first
    raise CaptureError(_explain(model, first)) from first


def _own_refusal(model: nn.Module, example: _Example) -> str | None:
    """Why the model itself does not run on the example, if that is what is wrong."""
    args, kwargs = pytree.tree_map(copied, (example.args, example.kwargs))
    try:
        with torch.no_grad(), _silent():
            model(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # whatever a model raises
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return (
            f"capture: {type(model).__name__} does not run on the example inputs: {type(error).__name__}: {told}; pass inputs "
            "that its forward takes, as tensors of the shapes it expects"
        )
    return None


def _as_it_runs(examples: list[_Example], ways: tuple[Switch, ...]) -> list[_Attempt]:
    """What is left when values decide: what the example decided, and what the model does when nothing traces it."""
    eager = (*ways, switches.as_eager)
    return [
        *[_Attempt(e, ways, "truths") for e in examples],
        *[_Attempt(e, eager, "truths") for e in examples],
        _Attempt(examples[-1], eager, "numbers"),
        _Attempt(examples[-1], ways, draft=True),
    ]


def _traced(
    model: nn.Module, attempt: _Attempt, always: list[Switch]
) -> tuple[torch.export.ExportedProgram, list[str]]:
    example = attempt.example
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(way(model)) for way in [*always, *attempt.ways]]
        stack.enter_context(_by_name(model, example.kwargs))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch.export's own deprecations are not the caller's
        stack.enter_context(_silent())
        if attempt.decided:
            answers = decisions(model, example.args, example.kwargs, numbers=attempt.decided == "numbers")
            said.append(stack.enter_context(answers))
        args, kwargs = _fresh((example.args, example.kwargs))
        trace: Any = torch.export.draft_export if attempt.draft else torch.export.export
        free = any(leaf is not None for leaf in pytree.tree_leaves(example.shapes))
        exported = trace(model, args, kwargs, dynamic_shapes=example.shapes if free else None, strict=False)
        # Tracing it all again, to have no operation write in place, takes twice as long as tracing did.
        if any(module.training for module in model.modules()) or not can_be_expanded(exported.graph_module):
            exported = exported.run_decompositions({})
        else:
            expand_composites(exported.graph_module)
        notes = [note for notes in said for note in notes]
    if attempt.draft:
        notes.append(
            "captured with branches that depend on values taken as the example takes them; other values are refused"
        )
    return exported, notes + ([example.note] if example.note else [])


def _fresh(tree: Any) -> Any:
    """The same values in other tensor objects: `torch.export` marks the sizes it was to leave free, for good."""
    seen: dict[int, Tensor] = {}

    def again(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            seen[id(leaf)] = leaf.detach().requires_grad_(leaf.requires_grad)
        return seen[id(leaf)]

    return pytree.tree_map(again, tree)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """A failure is told at length in the log, also where the next way works; what matters comes back as an error or a note."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _automatic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave free what may vary: all but the last (feature) dimension of float inputs, all dimensions of integer ones."""
    # A mask to be added is as wide as the sequence is long; features are as many as before.
    lengths = {t.shape[1] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim in (2, 3)}
    masks = {(length, length) for length in lengths}

    def free(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return None
        last = leaf.ndim - 1 if leaf.is_floating_point() and leaf.ndim > 1 else leaf.ndim
        dims = range(1) if leaf.is_floating_point() and leaf.ndim == 4 and leaf.shape[1] != 1 else range(last)
        if leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2] and leaf.shape[-2:] in masks:
            dims = range(leaf.ndim)
        return dict.fromkeys(dims, torch.export.Dim.AUTO)

    tree = pytree.tree_map(free, (args, kwargs))
    names = _names(model, len(args))
    return {**dict(zip(names, tree[0], strict=False)), **tree[1]} if not _variadic(model) else None


@contextlib.contextmanager
def _by_name(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let a model that takes some inputs by ``**kwargs`` name them: `torch.export` cannot leave their sizes free otherwise."""
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    further = [n for n in kwargs if n not in signature.parameters]
    if len(named) == len(signature.parameters) or not further:
        yield
        return
    own, forward = model.__dict__.get("forward"), model.forward

    def naming(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in further]
    naming.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    model.forward = naming
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _variadic(model: nn.Module) -> bool:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _names(model: nn.Module, count: int) -> tuple[str, ...]:
    names = [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in _POSITIONAL]
    return tuple(names[:count]) if count <= len(names) else tuple(f"arg{i}" for i in range(count))


def _double_single_batch(tree: Any) -> Any:
    """Repeat a batch of one, if all inputs have one: sizes of 1 are otherwise fixed by tracing."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return tree
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim > 0 else t, tree)


def _explain(model: nn.Module, failure: Exception | None) -> str:
    text = str(failure)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(failure).__name__)
    frames = inspect.getinnerframes(failure.__traceback__) if failure is not None and failure.__traceback__ else []
    own = [f for f in frames if not any(part in f.filename for part in ("/torch/", "capture/export.py", "<"))]
    where = ""
    if own:
        code = (own[-1].code_context or [""])[0].strip()
        where = f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].function}: {code}'
    if found := re.search(r"<class '?([\w.]+)'?> in (\w+), which is not a known type", text):
        return (
            f"capture: {type(model).__name__} has a {found[1]} in its {found[2]}, which torch.export cannot take apart; return a tuple "
            "or a dictionary, or register it (torch.export.register_dataclass for a dataclass)"
        )
    return (
        f"capture: {type(model).__name__} cannot be traced as one graph: {first}"
        + (f" (at {where})" if where else "")
        + "; remove data-dependent Python control flow from forward, pass dynamic_shapes explicitly, or use "
        'torch.compile(model, backend="recast"), which rewrites each graph between breaks'
    )


def from_exported(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: list[str] | None = None,
) -> Program:
    """Turn an `ExportedProgram` into a `Program`: weights become ``get_attr`` by original name, tied ones share one."""
    signature = exported.graph_signature
    tensors: dict[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    root, graph = nn.Module(), fx.Graph()
    first_by_identity: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = first_by_identity.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
    attributes: dict[str, fx.Node] = {}
    environment: dict[fx.Node, fx.Node] = {}
    constants: dict[int, Any] = {}
    position = 0
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            if node.op == "output":
                continue
            environment[node] = graph.node_copy(node, lambda n: environment[n])
            if node.op == "get_attr":
                set_by_path(root, str(node.target), getattr(exported.graph_module, str(node.target)))
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            environment[node] = graph.node_copy(node)
            if isinstance(spec.arg, ConstantArgument):
                constants[position] = spec.arg.value
            position += 1
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target is None:
            raise CaptureError(
                f"capture: {type(model).__name__} holds '{spec.target}' of kind {spec.kind.name}, which is not a tensor; "
                "move it out of forward or turn it into a buffer"
            )
        target = aliases.get(spec.target, spec.target)
        if target not in attributes:
            value = tensors.get(target)
            if value is None:
                value = exported.constants.get(target, exported.state_dict.get(target))
            set_by_path(root, target, value)
            attributes[target] = graph.get_attr(target)
            attributes[target].meta = dict(node.meta)
        environment[node] = attributes[target]
    _output(exported, graph, environment)
    module = graph_module(root, graph)
    program = Program(
        module=module,
        interface=Interface(
            parameters=_forward_names(model),
            args=_names(model, len(args)),
            kwargs=tuple(exported.call_spec.in_spec.child(1).context or ()),
            in_spec=exported.call_spec.in_spec,
            out_spec=exported.call_spec.out_spec,
            constants=constants,
            mutations=_mutations(exported, aliases),
        ),
        aliases=aliases,
        door="export",
        training=any(module.training for module in model.modules()),
        label=type(model).__name__,
        notes=list(notes or []),
    )
    program.notes += _settled(program)
    canonicalise(program)
    return program


def _settled(program: Program) -> list[str]:
    """What was left free and the model then settled: the program holds for this size only."""
    return [
        f"input '{node.name}' keeps size {fixed_size(size)} in dimension {dimension}: the model could not be traced for any other"
        for node in program.inputs()
        if isinstance(value := node.meta.get("val"), Tensor)
        for dimension, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt) and fixed_size(size) is not None
    ]


def _forward_names(model: nn.Module) -> tuple[str, ...]:
    return (
        ()
        if _variadic(model)
        else tuple(name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in _POSITIONAL)
    )


def _output(exported: torch.export.ExportedProgram, graph: fx.Graph, environment: dict[fx.Node, fx.Node]) -> None:
    output = next(iter(exported.graph.find_nodes(op="output")))
    results = [environment[a] if isinstance(a, fx.Node) else a for a in output.args[0]]
    copied = graph.output(tuple(results))
    copied.meta = dict(output.meta)


def _mutations(exported: torch.export.ExportedProgram, aliases: dict[str, str]) -> tuple[tuple[int, str, str], ...]:
    found = []
    for position, spec in enumerate(exported.graph_signature.output_specs):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            found.append((position, "weight", aliases.get(str(spec.target), str(spec.target))))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            found.append((position, "input", str(spec.target)))
        elif spec.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(f"capture: an output of kind {spec.kind.name} ('{spec.target}') is not supported")
    return tuple(found)
