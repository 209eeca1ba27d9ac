"""A 2:4 core between blocks of 128 on diagonals. PyTorch has no such product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.armor_matmul import reference
from recast.kernels.armor_matmul.armor_op import armor_matmul
from recast.kernels.sparse_matmul.bench import dense
from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.timed import BenchCase, Prepared, moved, two_of_four

__all__ = ["cases"]

_SIDE = 128


def cases() -> Iterator[BenchCase]:
    """Sides of 128; in 16 bits, as its core is."""
    yield BenchCase("ARMOR 128", "2:4", _prepare, multiples=(4, 4), roundings=2, dtypes=(torch.bfloat16, torch.float16))


def _prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    places = two_of_four(rows, inputs, device)
    values = (torch.randn(rows, inputs // 2, device=device) / inputs**0.5).to(dtype)
    words, marks = to_lanes(values, places)
    held = {
        "values": words,
        "places": marks,
        "left": _blocks(rows, dtype, device),
        "right": _blocks(inputs, dtype, device),
    }

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = armor_matmul(x, given["values"], given["places"], given["left"], given["right"], None)
        return y

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return reference.armor_matmul(x, dense(values.double(), places), given["left"], given["right"])

    weights = rows * inputs + _SIDE * (rows + inputs)
    work = moved(held, rows, inputs, weights=weights, rate="sparse bf16")
    return Prepared(held, run, meant, work, learned=("left", "right"))


def _blocks(features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Blocks on a diagonal near the identity, the last one zero beyond the features."""
    count = -(-features // _SIDE)
    blocks = torch.eye(_SIDE, device=device) + torch.randn(count, _SIDE, _SIDE, device=device) / 16
    beyond = torch.arange(count * _SIDE, device=device).reshape(count, _SIDE) >= features
    blocks = blocks.masked_fill(beyond.unsqueeze(1), 0).masked_fill(beyond.unsqueeze(2), 0)
    return blocks.to(dtype).contiguous()
