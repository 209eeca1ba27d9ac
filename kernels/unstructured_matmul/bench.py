"""A weight of values at any places, half and a third of them not zero; PyTorch would multiply it dense."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.timed import BenchCase, Prepared, moved
from recast.kernels.unstructured_matmul.lanes import from_lanes, to_lanes
from recast.kernels.unstructured_matmul.unstructured_op import unstructured_matmul

__all__ = ["cases"]

_NAMES = ("values", "words", "starts", "offsets")
_ANY = 1 << 30  # as many as the kernel takes


def cases() -> Iterator[BenchCase]:
    """Two densities."""
    for density in (0.5, 0.3):
        yield BenchCase(f"unstructured {100 * density:.0f} %", "sparse", functools.partial(_prepare, density))


def _prepare(density: float, rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    weight = torch.randn(rows, inputs, device=device) / inputs**0.5
    weight = torch.where(torch.rand_like(weight) < density, weight, 0).to(dtype)
    held = dict(zip(_NAMES, to_lanes(weight), strict=True))

    def multiply(given: Mapping[str, Tensor], x: Tensor, few: int) -> Tensor:
        y: Tensor = unstructured_matmul(x, *(given[name] for name in _NAMES), None, rows, few)
        return y

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return multiply(given, x, _ANY)

    def written_out(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return multiply(given, x, 0)

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        values, words, starts, offsets = (given[name] for name in _NAMES)
        return x @ from_lanes(values, words, starts, offsets, rows, inputs).to(x.dtype).T

    return Prepared(held, run, meant, moved(held, rows, inputs), ways={"written out": written_out})
