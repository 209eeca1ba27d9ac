"""What a product's kernel does with its sums before it stores them, in plain torch, and the gradients of that.

``y = f(z) * factor + residual`` for sums z, or where rows of a gate and of what it gates come in turns
``y = f(gate) * up * factor + residual``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "NOTHING", "RUN", "Epilogue", "backward", "finished", "in_turns", "taken_apart"]

# Rows of the gate that stand together, followed by as many of what it gates. A matrix unit's lane holds rows r and r + 8 of sixteen,
# so a lane that has a sum of the one has that of the other.
RUN = 8

aten = torch.ops.aten
_QUICK = 1.702

# By name: the function; and from a gradient and what went in, the gradient of that.
ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "relu2": (lambda z: torch.relu(z).square(), lambda g, z: g * 2 * torch.relu(z)),
    "gelu": (torch.nn.functional.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": (torch.nn.functional.silu, aten.silu_backward),
    "quick_gelu": (lambda z: z * torch.sigmoid(_QUICK * z), lambda g, z: g * _quick_gelu_slope(z)),
    "sigmoid": (torch.sigmoid, lambda g, z: g * torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "tanh": (torch.tanh, lambda g, z: g * (1 - torch.tanh(z).square())),
}


def _quick_gelu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(_QUICK * z)
    return gate + _QUICK * z * gate * (1 - gate)


class Epilogue(NamedTuple):
    """What is done with sums before they are stored.

    Attributes
    ----------
    activation
        One of `ACTIVATIONS`, or "" for none.
    gated
        Rows of a gate and of what it gates come in turns (`in_turns`); the activation is that of the gate.
    factor, residual
        (tokens, m) with m outputs, half as many as rows where they are gated; contiguous. Or None.
    """

    activation: str = ""
    gated: bool = False
    factor: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def of(cls, activation: str, gated: bool, factor: Tensor | None, residual: Tensor | None) -> Epilogue:
        """Take what an operation was given, with any dimensions before the outputs.

        Raises
        ------
        ValueError
            There is no such activation.

        Examples
        --------
        >>> Epilogue.of("relu", False, None, torch.zeros(2, 3, 4)).residual.shape
        torch.Size([6, 4])
        """
        if activation and activation not in ACTIVATIONS:
            raise ValueError(f"epilogue: no activation '{activation}'; there are {', '.join(ACTIVATIONS)}")
        flat = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (factor, residual)]
        return cls(activation, gated, *flat)

    @property
    def empty(self) -> bool:
        """Whether sums are stored as they are."""
        return not self.activation and not self.gated and self.factor is None and self.residual is None

    def outputs(self, rows: int) -> int:
        """How many outputs so many rows of a weight make."""
        return rows // 2 if self.gated else rows


NOTHING = Epilogue()


def in_turns(gate: Tensor, up: Tensor, dim: int = 0) -> Tensor:
    """Put the rows of two tensors in turns, eight of the first and eight of the second.

    Parameters
    ----------
    gate, up
        Of one shape, whose size along `dim` is a multiple of eight.

    Examples
    --------
    >>> in_turns(torch.zeros(16), torch.ones(16)).reshape(4, 8)[:, 0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    shape = *gate.shape[:dim], -1, RUN, *gate.shape[dim + 1 :]
    runs = [tensor.reshape(shape) for tensor in (gate, up)]
    return torch.stack(runs, dim + 1).flatten(dim, dim + 2).contiguous()


def taken_apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `in_turns` along the last dimension.

    Examples
    --------
    >>> gate, up = taken_apart(in_turns(torch.zeros(16), torch.ones(16)))
    >>> float(gate.sum()), float(up.sum())
    (0.0, 16.0)
    """
    gate, up = rows.reshape(*rows.shape[:-1], -1, 2, RUN).unbind(-2)
    return gate.flatten(-2), up.flatten(-2)


def finished(z: Tensor, epilogue: Epilogue) -> Tensor:
    """Do with sums (tokens, rows) what an epilogue says: (tokens, m) in their dtype.

    Examples
    --------
    >>> z = torch.tensor([[-1.0, 2.0]])
    >>> finished(z, Epilogue("relu", residual=torch.tensor([[10.0, 10.0]]))).tolist()
    [[10.0, 12.0]]
    """
    y, up = taken_apart(z) if epilogue.gated else (z, None)
    if epilogue.activation:
        y = ACTIVATIONS[epilogue.activation][0](y)
    for factor in (up, epilogue.factor):
        if factor is not None:
            y = y * factor
    return y if epilogue.residual is None else y + epilogue.residual


def backward(gradient: Tensor, z: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor | None]:
    """Return gradients of the sums, (tokens, rows), and of the factor; that of the residual is the gradient itself.

    Examples
    --------
    >>> backward(torch.tensor([[3.0, 3.0]]), torch.tensor([[-1.0, 2.0]]), Epilogue("relu"))[0].tolist()
    [[0.0, 3.0]]
    """
    to_factor = None
    if epilogue.factor is not None:
        to_factor = gradient * finished(z, epilogue._replace(factor=None, residual=None))
        gradient = gradient * epilogue.factor
    function, slope = ACTIVATIONS.get(epilogue.activation, (lambda z: z, lambda g, z: g))
    if not epilogue.gated:
        return slope(gradient, z), to_factor
    gate, up = taken_apart(z)
    return in_turns(slope(gradient * up, gate), gradient * function(gate), z.dim() - 1), to_factor
