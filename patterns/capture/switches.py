"""Switches of a model that decide whether it can be traced: set while it is, and set back whatever happens.

Each is a context manager over a model that yields what it did in words, for the notes of the program; nothing, where there was
nothing to do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recast.patterns.capture.known import EveryExpert

__all__ = [
    "Switch",
    "as_eager",
    "attention",
    "cache",
    "every_expert",
    "experts",
    "experts_configs",
    "export_patches",
    "gathered_experts",
    "is_transformers",
    "known_outputs",
    "outputs",
    "unmoved",
]

Switch = Callable[[nn.Module], "contextlib.AbstractContextManager[list[str]]"]

_UNSET = object()
_STATE = ("cached_rotary_positional_embedding", "cached_sequence_length")


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of the library transformers, which is not imported to find out."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def _configs(modules: Iterator[nn.Module]) -> list[Any]:
    found = {id(config): config for m in modules if (config := getattr(m, "config", None)) is not None}
    return list(found.values())


@contextlib.contextmanager
def _set(values: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes and set them back in reverse, each to what it was before; one that was not there is removed."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in values:
            before = vars(owner).get(name, _UNSET)
            setattr(owner, name, value)
            if before is _UNSET:
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, before)
        yield


@contextlib.contextmanager
def cache(model: nn.Module) -> Iterator[list[str]]:
    """Keep a model from giving back a key-value cache."""
    changed = [c for c in _configs(model.modules()) if getattr(c, "use_cache", None) is True]
    with _set([(config, "use_cache", False) for config in changed]):
        said = "captured with use_cache=False: no key-value cache is given back (pass use_cache to decide)"
        yield [said] if changed else []


def experts_configs(model: nn.Module) -> list[Any]:
    """The configurations by which modules of a model choose their experts' code."""
    return _configs(m for m in model.modules() if hasattr(m, "_apply_gate"))


@contextlib.contextmanager
def experts(
    model: nn.Module,
    wanted: str = "grouped_mm",
    instead_of: tuple[str | None, ...] = (None, "eager"),
    configs: list[Any] | None = None,
) -> Iterator[list[str]]:
    """Run the experts of a mixture as batched products: a Python loop over the experts that were hit cannot be traced.

    Parameters
    ----------
    model
        Any module; those of its modules that choose their experts' code by ``config._experts_implementation`` are switched.
    wanted
        ``grouped_mm`` (tokens sorted by expert) or ``batched_mm`` (each token's matrices gathered).
    instead_of
        What is replaced.
    configs
        Of `experts_configs`, where they were looked up before.
    """
    holders = experts_configs(model) if configs is None else configs
    changed = [c for c in holders if getattr(c, "_experts_implementation", wanted) in instead_of]
    before = {str(c._experts_implementation) for c in changed}
    internal = "_experts_implementation_internal"
    with _set([(c, internal if internal in vars(c) else "_experts_implementation", wanted) for c in changed]):
        said = f"captured with experts as '{wanted}': '{', '.join(sorted(before))}', as the model has them, cannot be traced"
        yield [said] if changed else []


def gathered_experts(model: nn.Module) -> contextlib.AbstractContextManager[list[str]]:
    """Run the experts of a mixture as batched products of gathered matrices, where grouped ones cannot be traced either."""
    return experts(model, "batched_mm", (None, "eager", "grouped_mm"))


@contextlib.contextmanager
def attention(model: nn.Module) -> Iterator[list[str]]:
    """Write attention out (matmul, softmax, matmul) where a fused operation asks about sizes that tracing leaves open."""
    changed = [
        c for c in _configs(model.modules()) if getattr(c, "_attn_implementation", "eager") not in ("eager", None)
    ]
    before = {str(c._attn_implementation) for c in changed}
    internal = "_attn_implementation_internal"
    with _set([(c, internal if internal in vars(c) else "_attn_implementation", "eager") for c in changed]):
        said = f"captured with attention as 'eager': '{', '.join(sorted(before))}', as the model has it, could not be traced"
        yield [said] if changed else []


@contextlib.contextmanager
def export_patches(model: nn.Module) -> Iterator[list[str]]:
    """Let transformers replace, for the time of tracing, the code that it knows not to export (since release 5.10 or so)."""
    patches = _exporter_patches() if is_transformers(model) else None
    if patches is None:
        yield []
        return
    stateful = [(m, name, None) for m in model.modules() for name in _STATE if name in vars(m)]
    with _set(stateful), patches:
        yield ["captured with the export patches of transformers"]


def _exporter_patches() -> Any:
    root = logging.getLogger("transformers")
    level = root.level
    try:
        root.setLevel(logging.ERROR)
        importlib.import_module("transformers.exporters.exporter_dynamo")  # registers them
        return importlib.import_module("transformers.exporters.utils").apply_patches("dynamo")
    except (ImportError, AttributeError):  # a release without them
        return None
    finally:
        root.setLevel(level)


@contextlib.contextmanager
def as_eager(_: nn.Module) -> Iterator[list[str]]:
    """Let the model take the way it takes when it is run, not the one it keeps for compilers.

    Models ask `torch.compiler.is_compiling` and leave out what they think a compiler cannot do, such as a mask of ones that
    later code reads. Only code outside of PyTorch is answered no.
    """
    said: list[str] = []
    asked = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting")}

    def answer(name: str) -> bool:
        inside = str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] == "torch"
        truth = bool(asked[name]())
        if truth and not inside:
            said[:] = ["captured along the model's way for eager runs: its way for compilers cannot be traced"]
            return False
        return truth

    with _set([(torch.compiler, name, functools.wraps(f)(lambda n=name: answer(n))) for name, f in asked.items()]):
        yield said


def known_outputs(model: nn.Module) -> None:
    """Make the result classes of transformers known to `torch.utils._pytree`, those that are not yet.

    Each registers itself where its class is made or first used, but not while something is compiling: one that was first
    imported or used then stays unknown, and `torch.export` refuses it.
    """
    generic = sys.modules.get("transformers.utils.generic")
    register = getattr(generic, "_register_model_output_pytree_node", None)
    if register is None or not any(is_transformers(m) for m in model.modules()):
        return  # nothing of transformers, or a release that always registers them
    assert generic is not None
    with _set([(torch.compiler, "is_compiling", lambda: False)]):
        for cls in _subclasses(generic.ModelOutput):
            if cls not in pytree.SUPPORTED_NODES:
                getattr(generic, "_registered_model_output_types", set()).discard(cls)
                register(cls)


def _subclasses(cls: Any) -> Iterator[type]:
    for subclass in list[Any](cls.__subclasses__()):
        yield subclass
        yield from _subclasses(subclass)


@contextlib.contextmanager
def every_expert(model: nn.Module) -> Iterator[list[str]]:
    """Let a loop over the experts that were hit run over all of them: those without a token add nothing.

    Which were hit depends on values, so the loop ``for expert in (tokens_of_expert > 0).nonzero()`` has no length to trace.
    """
    said: list[str] = []
    with EveryExpert(model, said):
        yield said


@contextlib.contextmanager
def unmoved(_: nn.Module) -> Iterator[list[str]]:
    """Leave a module as it is that is moved to where it is: casting a router in ``forward`` replaces parameters."""
    move = nn.Module.to

    @functools.wraps(move)
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        there = all(
            device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors
        )
        return module if there else move(module, *args, **kwargs)

    with _set([(nn.Module, "to", to)]):
        yield []


@contextlib.contextmanager
def outputs(model: nn.Module) -> Iterator[list[str]]:
    """Leave out results that are no tensors, nor containers of them: a cache object of a model's own class."""
    said: list[str] = []

    def keep(_: nn.Module, __: Any, result: Any) -> Any:
        said.clear()
        return _without_objects(result, said)

    handle = model.register_forward_hook(keep)
    try:
        yield said
    finally:
        handle.remove()


def _without_objects(result: Any, said: list[str]) -> Any:
    if isinstance(result, dict):
        kept = {name: value for name, value in result.items() if _plain(value)}
        said += [
            f"captured without output '{name}' ({type(result[name]).__name__}), which is no tensor"
            for name in result
            if name not in kept
        ]
        return result if len(kept) == len(result) else kept
    if isinstance(result, tuple) and any(not _plain(value) for value in result):
        said += [
            f"captured without output {position} ({type(value).__name__}), which is no tensor"
            for position, value in enumerate(result)
            if not _plain(value)
        ]
        return tuple(value for value in result if _plain(value))
    return result


def _plain(value: Any) -> bool:
    return all(isinstance(leaf, Tensor | int | float | bool | str | None) for leaf in pytree.tree_leaves(value))
