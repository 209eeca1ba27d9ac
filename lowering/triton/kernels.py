"""Which Triton kernel runs which operator; what none serves is left to Inductor as plain torch code.

Every file under ``serving/`` offers ``serve(operator)``: the operator laid out for its kernel, the reason why not as the name of a
kernel (`recast.lowering.packed.plain`), or None if the operator is not its concern. It may offer ``serve_dense(operator)`` as well,
which is asked first where the user allows the memory of dense weights. If either has a keyword `copies`, it is told whether a weight
may be held in a second layout for many tokens. A dict `PAIRED` says of operations that can run a gate and what it gates at once along
which dimension each of their tensors has a weight's rows. Nothing here is changed to add a file.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from recast.lowering.inline import Choose
from recast.lowering.packed import Leaf, Packed, chooser
from recast.lowering.triton import serving
from recast.passes.forms.operator import Operator

__all__ = ["choice", "choose", "paired"]


@functools.cache
def _files() -> tuple[ModuleType, ...]:
    """In the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(serving.__path__))
    return tuple(importlib.import_module(f"{serving.__name__}.{name}") for name in names)


def paired() -> dict[Any, dict[str, int]]:
    """For each operation that can run two products at once: along which dimension each of its tensors has rows."""
    return {target: rows for file in _files() for target, rows in getattr(file, "PAIRED", {}).items()}


@functools.cache
def _served(offered: str, copies: bool) -> tuple[Leaf, ...]:
    """What every file offers by that name, in the order of the files' names."""
    found = [getattr(file, offered) for file in _files() if hasattr(file, offered)]
    told = [functools.partial(f, copies=copies) if "copies" in inspect.signature(f).parameters else f for f in found]
    return tuple(told)


def _leaf(operator: Operator, keep_dense: bool, copies: bool) -> Packed | None:
    asked = (*(_served("serve_dense", copies) if keep_dense else ()), *_served("serve", copies))
    return next((packed for serve in asked if (packed := serve(operator)) is not None), None)


def choice(*, keep_dense: bool = False, copies: bool = True) -> Choose:
    """Choice of kernels.

    Parameters
    ----------
    keep_dense
        Weights may be written out where that is faster than any kernel.
    copies
        Weights may be held in a second layout for many tokens.
    """
    return chooser(functools.partial(_leaf, keep_dense=keep_dense, copies=copies), "aten")


choose = choice()
