"""Switches of a model that decide whether it can be traced: set while it is, and set back whatever happens.

Each is a context manager over a model that yields what it did in words, for the notes of the program; nothing, where there was
nothing to do.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Switch", "attention", "cache", "every_expert", "experts", "export_patches", "is_transformers", "outputs"]

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


@contextlib.contextmanager
def experts(
    model: nn.Module, wanted: str = "grouped_mm", instead_of: tuple[str | None, ...] = (None, "eager")
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
    """
    holders = _configs(m for m in model.modules() if hasattr(m, "_apply_gate"))
    changed = [c for c in holders if getattr(c, "_experts_implementation", wanted) in instead_of]
    before = {str(c._experts_implementation) for c in changed}
    internal = "_experts_implementation_internal"
    with _set([(c, internal if internal in vars(c) else "_experts_implementation", wanted) for c in changed]):
        said = f"captured with experts as '{wanted}': '{', '.join(sorted(before))}', as the model has them, cannot be traced"
        yield [said] if changed else []


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
def every_expert(model: nn.Module) -> Iterator[list[str]]:
    """Let a loop over the experts that were hit run over all of them: those without a token add nothing.

    Which were hit depends on values, so the loop ``for expert in (tokens_of_expert > 0).nonzero()`` has no length to trace.
    """
    counts = {n for m in model.modules() if isinstance(n := getattr(m, "num_experts", None), int)}
    said: list[str] = []
    with _EveryExpert(counts, said):
        yield said


class _EveryExpert(TorchFunctionMode):
    """``nonzero`` of a short column of truth values, one for each expert, gives all rows."""

    def __init__(self, counts: set[int], said: list[str]) -> None:
        super().__init__()
        self.counts = counts
        self.said = said

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.nonzero, torch.nonzero) and not kwargs.get("as_tuple", False) and _is_column(args[0]):
            self.said[:] = [
                "captured with every expert visited: a loop over the experts that were hit cannot be traced"
            ]
            count = args[0].shape[0]
            # A row more than there are experts stands for tokens sent nowhere: never visited.
            rows = torch.arange(count - 1 if count - 1 in self.counts and count not in self.counts else count)
            rows = rows.to(args[0].device)
            return torch.stack([rows, *[torch.zeros_like(rows)] * (args[0].ndim - 1)], 1)
        return func(*args, **kwargs)


def _is_column(value: Tensor) -> bool:
    """Whether these are truth values of a number known to tracing, in one dimension: of experts, not of tokens."""
    sizes = value.shape
    fixed = all(isinstance(size, int) for size in sizes)
    return value.dtype == torch.bool and fixed and value.ndim > 0 and sizes.numel() == sizes[0] and 1 < sizes[0] <= 1024


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
