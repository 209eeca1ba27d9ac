"""Which Triton kernel runs which operator; what none serves is left to Inductor as plain torch code.

Every file under ``serving/`` offers ``serve(operator)``: the operator laid out for its kernel, the reason why not as the name of a
kernel (`recast.lowering.packed.plain`), or None if the operator is not its concern. It may offer ``serve_dense(operator)`` as well,
which is asked first where the user allows the memory of dense weights. Nothing here is changed to add one.
kernel (`recast.lowering.packed.plain`), or None if the operator is not its concern. Nothing here is changed to add one. If its `serve`
has a keyword `copies`, it is told whether a weight may be held in a second layout for many tokens.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

from recast.lowering.inline import Choose
from recast.lowering.packed import Leaf, Packed, chooser
from recast.lowering.triton import serving
from recast.passes.forms.operator import Operator

__all__ = ["choice", "choose"]


@functools.cache
def _served(offered: str) -> tuple[Leaf, ...]:
    """What every file offers by that name, in the order of the files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(serving.__path__))
    files = [importlib.import_module(f"{serving.__name__}.{name}") for name in names]
    return tuple(getattr(file, offered) for file in files if hasattr(file, offered))


def _leaf(operator: Operator, keep_dense: bool = False) -> Packed | None:
    asked = (*_served("serve_dense"), *_served("serve")) if keep_dense else _served("serve")
    return next((packed for serve in asked if (packed := serve(operator)) is not None), None)


def choice(*, keep_dense: bool = False) -> Choose:
    """Choice of kernels; with `keep_dense` weights may be written out where that is faster than any kernel."""
    return chooser(functools.partial(_leaf, keep_dense=keep_dense), "aten")
def _served(copies: bool) -> tuple[Leaf, ...]:
    """What every file offers, by name of the file."""
    names = sorted(module.name for module in pkgutil.iter_modules(serving.__path__))
    offered = [importlib.import_module(f"{serving.__name__}.{name}").serve for name in names]
    told = [functools.partial(f, copies=copies) if "copies" in inspect.signature(f).parameters else f for f in offered]
    return tuple(told)


def _leaf(operator: Operator, copies: bool) -> Packed | None:
    return next((packed for serve in _served(copies) if (packed := serve(operator)) is not None), None)


def choice(*, copies: bool = True) -> Choose:
    """Choice of kernels, with second layouts of weights for many tokens or without."""
    return chooser(functools.partial(_leaf, copies=copies), "aten")


choose = choice()
