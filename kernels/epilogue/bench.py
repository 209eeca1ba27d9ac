"""A product with what follows it in one kernel; beside it the product and PyTorch's activation one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.low_rank_matmul.low_rank_op import low_rank_matmul
from recast.kernels.timed import BenchCase, Prepared, Run, moved, rank_for

__all__ = ["cases"]

_PEER = "low rank 32 %, then gelu"


def cases() -> Iterator[BenchCase]:
    """Two thin factors and GELU, in one operation and in two."""
    yield BenchCase("low rank 32 % + gelu", "epilogue", _prepare(_fused), against=(_PEER,), roundings=1)
    yield BenchCase(_PEER, "epilogue", _prepare(_apart), peer=True, dtypes=(torch.bfloat16,), roundings=2)


def _fused(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = low_rank_matmul(x, given["left"], given["right"], None, activation="gelu")
    return y


def _apart(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(low_rank_matmul(x, given["left"], given["right"], None))


def _meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x @ given["right"].T @ given["left"].T)


def _prepare(run: Run) -> Callable[[int, int, torch.dtype, torch.device], Prepared]:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        inner = rank_for(0.325, rows, inputs, of=64 if min(rows, inputs) > 1024 else 16)
        held = {
            "left": (torch.randn(rows, inner, device=device) / inner**0.5).to(dtype),
            "right": (torch.randn(inner, inputs, device=device) / inputs**0.5).to(dtype),
        }
        work = moved(held, rows, inputs, weights=inner * (rows + inputs))
        return Prepared(held, run, _meant, work, learned=("left", "right"))

    return prepare
