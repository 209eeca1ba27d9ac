"""Which kernel runs which operator under Inductor."""

from __future__ import annotations

from torch import Tensor

from recast.lowering.inline import Emit
from recast.passes.forms.operator import Operator

__all__ = ["choose"]


def choose(operator: Operator) -> tuple[str, Operator, Emit]:
    """Kernel of an operator: its name, the operator as the kernel wants it, and what runs it."""
    return "aten", operator, _apply


def _apply(operator: Operator, x: Tensor) -> Tensor:
    return operator.apply(x)
