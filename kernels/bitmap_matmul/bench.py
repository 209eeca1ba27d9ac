"""A sparse matrix with marks in a bitmap, half of its numbers not zero, as CoSpaDi's coefficients; PyTorch would multiply it dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.bitmap_matmul.bitmap_op import bitmap_matmul
from recast.kernels.bitmap_matmul.reference import from_quads, to_quads
from recast.kernels.timed import BenchCase, Prepared, moved

__all__ = ["cases"]

_NAMES = ("values", "words", "starts")


def cases() -> Iterator[BenchCase]:
    """Marks for every other number."""
    yield BenchCase("bitmap 50 %", "sparse", _prepare)


def _prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    mask = torch.rand(rows, inputs, device=device) < 0.5
    drawn = torch.randn(int(mask.sum()), device=device) / inputs**0.5
    held = dict(zip(_NAMES, to_quads(drawn.to(dtype), mask), strict=True))

    def multiply(given: Mapping[str, Tensor], x: Tensor, few: int) -> Tensor:
        y: Tensor = bitmap_matmul(x, *(given[name] for name in _NAMES), None, rows, few)
        return y

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return multiply(given, x, 0)

    def written_out(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return multiply(given, x, 1)

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ from_quads(given["values"].to(x.dtype), given["words"], rows, inputs).T

    work = moved(held, rows, inputs)
    return Prepared(held, run, meant, work, ways={"written out": written_out}, learned=("values",))
