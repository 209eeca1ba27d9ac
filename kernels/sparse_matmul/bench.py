"""Two of every four inputs in 16-bit floats; beside it PyTorch's semi-structured sparse tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.sparse24_op import sparse24_matmul
from recast.kernels.timed import BenchCase, Prepared, moved, two_of_four

__all__ = ["cases"]

_PEER = "torch.sparse semi-structured"
_HALF = (torch.bfloat16, torch.float16)


def cases() -> Iterator[BenchCase]:
    """The kernel and its peer, which wants sides of 64."""
    yield BenchCase("2:4", "2:4", _prepare, against=(_PEER,), multiples=(1, 4), dtypes=_HALF)
    yield BenchCase(_PEER, "2:4", _of_torch, peer=True, multiples=(64, 64), dtypes=_HALF[:1], gradients=False)


def _drawn(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    values = (torch.randn(rows, inputs // 2, device=device) / inputs**0.5).to(dtype)
    return values, two_of_four(rows, inputs, device)


def dense(values: Tensor, places: Tensor) -> Tensor:
    """Write two of every four inputs out: (m, 2 groups) and their places to (m, 4 groups)."""
    rows = values.shape[0]
    groups = values.new_zeros(rows, values.shape[1] // 2, 4)
    return groups.scatter_(2, places.long().reshape(rows, -1, 2), values.reshape(rows, -1, 2)).reshape(rows, -1)


def _prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    values, places = _drawn(rows, inputs, dtype, device)
    words, marks = to_lanes(values, places)
    held = {"values": words, "places": marks}

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = sparse24_matmul(x, given["values"], given["places"], None)
        return y

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ dense(values.double(), places).T

    return Prepared(held, run, meant, moved(held, rows, inputs, rate="sparse bf16"))


def _of_torch(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    values, places = _drawn(rows, inputs, dtype, device)

    def again() -> dict[str, Tensor]:
        return {"weight": torch.sparse.to_sparse_semi_structured(dense(values, places))}

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, given["weight"])

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ dense(values.double(), places).T

    nbytes = rows * inputs * 9 // 8  # values in 16 bits and two bits for the place of each
    return Prepared(again(), run, meant, moved(nbytes, rows, inputs, rate="sparse bf16"), again=again)
