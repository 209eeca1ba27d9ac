"""Two of every four inputs, their values in codes. PyTorch has no such product; `2:4` and the codes stand beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.launch import pairs_of
from recast.kernels.sparse24_codes_matmul.codes_op import sparse24_codes_matmul
from recast.kernels.sparse24_codes_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.bench import dense
from recast.kernels.timed import BenchCase, Prepared, moved, two_of_four

__all__ = ["cases"]


def cases() -> Iterator[BenchCase]:
    """Four and eight bits of integers, and a table of four; groups count inputs, twice as many as values."""
    yield _case("2:4 of int4 g128", 4, 256)
    yield _case("2:4 of int8", 8, 0)
    yield _case("2:4 of nf4 g64", 4, 128, table=True)


def _case(name: str, bits: int, group: int, *, table: bool = False) -> BenchCase:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        return _laid_out(rows, inputs, dtype, device, bits, group, table=table)

    return BenchCase(name, "2:4", prepare, multiples=(1, 4))


def _laid_out(
    rows: int, inputs: int, dtype: torch.dtype, device: torch.device, bits: int, group: int, *, table: bool
) -> Prepared:
    group = 0 if group >= inputs else group
    groups = -(-inputs // group) if group else 1
    codes = torch.randint(1, 2**bits, (rows, inputs // 2), dtype=torch.uint8, device=device)
    places = two_of_four(rows, inputs, device)
    words, marks = to_lanes(codes, places, bits, 0 if table else 2 ** (bits - 1))
    held = {"values": words, "places": marks}
    held["scale"] = (torch.rand(groups, rows, device=device) + 0.5) / (inputs**0.5 * (1 if table else 2 ** (bits - 2)))
    if table:
        entries = torch.randn(2**bits, device=device).to(dtype)
        held["table"] = torch.where(torch.arange(2**bits, device=device) == 0, 0, entries)
        if dtype.itemsize == 2:
            held["pairs"] = pairs_of(held["table"])

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = [given.get(name) for name in ("scale", "table", "pairs")]
        y: Tensor = sparse24_codes_matmul(x, given["values"], given["places"], *parts, None, bits, group)
        return y

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        numbers = given["table"].double()[codes.int()] if table else codes.double() - 2 ** (bits - 1)
        of = given["scale"].double().T.repeat_interleave(group or inputs, 1)[:, :inputs]
        return x @ (dense(numbers, places) * of).T

    return Prepared(held, run, meant, moved(held, rows, inputs, rate="sparse bf16"))
