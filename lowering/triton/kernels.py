"""Which Triton kernel runs which operator; what none serves is left to Inductor as plain torch code.

Every file under ``serving/`` offers ``serve(operator)``: the operator laid out for its kernel, the reason why not as the name of a
kernel (`recast.lowering.packed.plain`), or None if the operator is not its concern. Nothing here is changed to add one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from recast.lowering.packed import Leaf, Packed, chooser
from recast.lowering.triton import serving
from recast.passes.forms.operator import Operator

__all__ = ["choose"]


@functools.cache
def _served() -> tuple[Leaf, ...]:
    """What every file offers, by name of the file."""
    names = sorted(module.name for module in pkgutil.iter_modules(serving.__path__))
    return tuple(importlib.import_module(f"{serving.__name__}.{name}").serve for name in names)


def _leaf(operator: Operator) -> Packed | None:
    return next((packed for serve in _served() if (packed := serve(operator)) is not None), None)


choose = chooser(_leaf, "aten")
