"""Values while a graph runs: tensors, and numbers that are known without any tensor, such as sizes.

Shape arithmetic is a large part of exported graphs. Held as Python numbers it leaves no trace in the captured program, and sizes
stay free: under `torch.export` they are symbols, which Python adds and multiplies like numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Known", "Left", "Value", "known", "largest", "numbers", "smallest", "tensor_of"]

# More numbers than this are a table, not a shape.
_MOST = 64
_PARAMETERS = ("weight", "bias", "gamma", "beta", "scale")


class Left(Exception):
    """An operator, or a use of it, that has no function here: the node is left as it is, for the reason given."""


@dataclasses.dataclass(frozen=True)
class Known:
    """Numbers known while tracing: Python's, or symbols of sizes.

    Parameters
    ----------
    values
        An array of objects, of any number of dimensions.
    dtype
        Of the tensor they stand for.
    """

    values: np.ndarray[Any, np.dtype[Any]]
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Any, dtype: torch.dtype = torch.int64) -> Known:
        """From a number or (nested) lists of numbers."""
        return cls(_objects(values), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor they stand for."""
        return tuple(self.values.shape)

    @property
    def number(self) -> Any:
        """The only number; Left if there are several."""
        if self.values.size != 1:
            raise Left(f"{self.values.size} numbers where one is meant")
        return self.values.reshape(-1)[0]

    def list(self) -> list[Any]:
        """All numbers in order."""
        return list(self.values.reshape(-1))

    def map(self, function: Callable[..., Any], *others: Known, dtype: torch.dtype | None = None) -> Known:
        """Apply a function of numbers, with the others broadcast to fit."""
        arrays = np.broadcast_arrays(self.values, *(other.values for other in others))
        made = np.empty(arrays[0].shape, dtype=object)
        for index in np.ndindex(*made.shape):
            made[index] = function(*(array[index] for array in arrays))
        return Known(made, dtype or self.dtype)

    def tensor(self) -> Tensor:
        """Write them out as a tensor."""
        numbers = self.list()
        if not any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in numbers):
            return torch.tensor(numbers, dtype=self.dtype).reshape(self.shape)
        written = [torch.full((), n, dtype=self.dtype) for n in numbers]
        return written[0].reshape(self.shape) if len(written) == 1 else torch.stack(written).reshape(self.shape)


Value = Tensor | Known


def known(tensor: Tensor, name: str = "", *, every: bool = False) -> Known | None:
    """A constant as numbers, if it is one that shapes, axes or factors are made of, and no weight of the model.

    Of floating point, that is a single number; with `every`, several as well.
    """
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    if tensor.numel() > _MOST or tensor.ndim > 1 or tensor.is_complex():
        return None
    if (
        not whole
        and not every
        and (tensor.numel() != 1 or (tensor.ndim and name.rpartition(".")[2].lower() in _PARAMETERS))
    ):
        return None
    return Known(_objects(tensor.tolist()), tensor.dtype)


def tensor_of(value: Value) -> Tensor:
    """The value as a tensor."""
    return value.tensor() if isinstance(value, Known) else value


def _objects(values: Any) -> np.ndarray[Any, np.dtype[Any]]:
    if not isinstance(values, list | tuple):
        made = np.empty((), dtype=object)
        made[()] = values
        return made
    rows = [_objects(value) for value in values]
    made = np.empty((len(rows), *(rows[0].shape if rows else ())), dtype=object)
    for index, row in enumerate(rows):
        made[index] = row[()] if row.ndim == 0 else row
    return made


def numbers(values: Iterable[Any]) -> list[int]:
    """Whole numbers that must be known and no symbols: axes, permutations."""
    found = []
    for value in values:
        if isinstance(value, torch.SymInt):
            raise Left("an axis that depends on a size")
        found.append(int(value))
    return found


def largest(a: Any, b: Any) -> Any:
    """The larger of two numbers, a symbol if one of them is."""
    return torch.sym_max(a, b)  # type: ignore[no-untyped-call]


def smallest(a: Any, b: Any) -> Any:
    """The smaller one."""
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call]
