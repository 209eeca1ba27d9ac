"""Two thin factors at a third of the parameters; beside them two products of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.low_rank_matmul.low_rank_op import low_rank_matmul
from recast.kernels.timed import BenchCase, Prepared, Run, moved, rank_for

__all__ = ["cases"]

_PEER = "torch, two F.linear"


def cases() -> Iterator[BenchCase]:
    """The operation and its peer, and a rank that is no multiple of anything, to be checked."""
    yield BenchCase("low rank 32 %", "low rank", _prepare(_run), against=(_PEER,), roundings=1)
    yield BenchCase("low rank, rank 37", "low rank", _prepare(_run, 37), roundings=1, timed=False)
    yield BenchCase(_PEER, "low rank", _prepare(_twice), peer=True, dtypes=(torch.bfloat16,), roundings=1)


def _run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = low_rank_matmul(x, given["left"], given["right"], None)
    return y


def _twice(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(torch.nn.functional.linear(x, given["right"]), given["left"])


def _prepare(run: Run, rank: int = 0) -> Callable[[int, int, torch.dtype, torch.device], Prepared]:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        # Between 32.0 and 32.5 % of the parameters, at a multiple of 64.
        inner = rank or rank_for(0.325, rows, inputs, of=64 if min(rows, inputs) > 1024 else 16)
        held = {
            "left": (torch.randn(rows, inner, device=device) / inner**0.5).to(dtype),
            "right": (torch.randn(inner, inputs, device=device) / inputs**0.5).to(dtype),
        }
        work = moved(held, rows, inputs, weights=inner * (rows + inputs))
        return Prepared(held, run, _twice, work, learned=("left", "right"))

    return prepare
