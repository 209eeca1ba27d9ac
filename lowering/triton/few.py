"""Up to how many tokens a kernel is faster than the library on the same tensors: measured on the GPU when a program is lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recast.lowering.timing import most_tokens

__all__ = ["ALWAYS", "measured_few"]

# As an operation's operand `few`: its kernels, whatever the number of tokens.
ALWAYS = -1
_AMONG = (1, 4, 16, 64, 256, 1024, 4096)


def measured_few(
    multiply: Callable[[Tensor, int], Tensor], features: int, dtype: torch.dtype, device: torch.device, *about: Any
) -> int | None:
    """Return the operand `few` of an operation: the most tokens that go to its kernels.

    Parameters
    ----------
    multiply
        The operation, given vectors (tokens, features) and `few`.
    features, dtype, device
        Of the vectors.
    about
        What else times depend on: the operation, the shapes and formats of its tensors.

    Returns
    -------
    int or None
        0 where the library wins at once, `ALWAYS` where the kernels win throughout; None where there is no GPU to time.

    Examples
    --------
    >>> measured_few(lambda x, few: x, 8, torch.float32, torch.device("cpu"), "nothing") is None
    True
    """
    return search(multiply, features, dtype, device, *about) if device.type == "cuda" else None


def search(
    multiply: Callable[[Tensor, int], Tensor], features: int, dtype: torch.dtype, device: torch.device, *about: Any
) -> int:
    """Time both ways, wherever they run; as `measured_few`."""

    def ways(tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(tokens, features, device=device).to(dtype)
        return functools.partial(multiply, x, ALWAYS), functools.partial(multiply, x, 0)

    most = most_tokens(ways, device, *about, features, str(dtype), among=_AMONG)
    return ALWAYS if most == _AMONG[-1] else most
