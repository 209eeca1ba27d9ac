"""`OperatorModule`: a fitted operator as a node of a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from recast.passes.forms.operator import Operator

__all__ = ["OperatorModule"]


class OperatorModule(nn.Module):
    """Applies a fitted operator in place of a linear; its tensors are buffers.

    Parameters
    ----------
    operator
        What was fitted.
    site
        Name of the site it stands for.
    form
        Text of the form asked for.
    order
        Where the operator's rows are those of a packed weight taken apart in another order: position of each of the
        model's output features among the operator's.
    """

    order: Tensor | None

    def __init__(self, operator: Operator, site: str, form: str, order: Tensor | None = None) -> None:
        super().__init__()
        self.site, self.form = site, form
        self.structure = operator
        self.names = {name: name.replace(".", "__") for name in operator.tensors()}
        for name, tensor in operator.tensors().items():
            self.register_buffer(self.names[name], tensor.detach())
        self.register_buffer("order", order)

    @property
    def operator(self) -> Operator:
        """The operator over this module's current buffers."""
        return self.structure.with_tensors({name: getattr(self, mangled) for name, mangled in self.names.items()})

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply to ``(..., in_features)``, add the bias."""
        y = self.operator.apply(x)
        if self.order is not None:
            y = y.index_select(-1, self.order)
        return y if bias is None else y + bias

    def fake(self, mode: Any, memo: dict[str, Any]) -> Any:
        """A callable of the same structure over fake tensors, for shape propagation."""
        with _disable_current_modes():
            fakes = {n: mode.from_tensor(getattr(self, m), static_shapes=True) for n, m in self.names.items()}
            order = None if self.order is None else mode.from_tensor(self.order, static_shapes=True)
        operator = self.structure.with_tensors(fakes)

        def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
            y = operator.apply(x)
            if order is not None:
                y = torch.index_select(y, -1, order)
            return y if bias is None else y + bias

        return run

    def __repr__(self) -> str:
        return f"linear<{self.form}>[{self.site}]"
