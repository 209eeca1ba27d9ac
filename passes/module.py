"""`OperatorModule`: a fitted operator as a node of a program."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    def outline(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """A value of the result's shape and dtype, for shape propagation: operators keep both of a linear.

        Running the operator on fake tensors would say the same, at many times the cost; verification runs the real one.
        """
        dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
        return x.new_empty((*x.shape[:-1], self.structure.shape[0]), dtype=dtype)

    def __repr__(self) -> str:
        return f"linear<{self.form}>[{self.site}]"
