"""Packed codes with floating activations, with and without a low-rank term; beside them PyTorch's own packed products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from recast.kernels.quantized_matmul.dequantizing_op import dequantizing_matmul
from recast.kernels.quantized_matmul.lanes import to_lanes
from recast.kernels.quantized_matmul.launch import pairs_of
from recast.kernels.timed import BenchCase, Prepared, Run, moved

__all__ = ["cases"]

_INT4 = ("torch _weight_int4pack_mm",)
_INT8 = ("torch _weight_int8pack_mm", "torch int8 written out, compiled")
_FP8 = ("torch fp8 written out, compiled",)


def cases() -> Iterator[BenchCase]:
    """Every number of bits and kind of code, at the groups that forms have; then the peers."""
    yield _case("int4 g128", 4, 128, against=_INT4)
    yield _case("int4 g128 zeros", 4, 128, zeros=True, against=_INT4)
    yield _case("int4 g128 + rank 64", 4, 128, rank=64, against=_INT4)
    yield _case("int3 g128", 3, 128, zeros=True)
    yield _case("int2 g64", 2, 64, zeros=True)
    yield _case("int8", 8, 0, against=_INT8)
    yield _case("nf4 g64", 4, 64, "pairs")
    yield _case("fp4 g64", 4, 64, "pairs")
    yield _case("fp8", 8, 0, "float", against=_FP8)
    yield _case("fp8 as a table of 256", 8, 0, "table", against=_FP8)
    yield _case("int4 g32", 4, 32, timed=False)
    yield _case("int3 symmetric", 3, 128, timed=False)
    yield _case("nf3 g64", 3, 64, "pairs", timed=False)
    yield _case("nf2 g64", 2, 64, "pairs", timed=False)
    yield _case("int8 g128 zeros + rank 40", 8, 128, zeros=True, rank=40, timed=False)
    yield BenchCase(_INT4[0], "codes", _int4pack, peer=True, multiples=(16, 128), dtypes=_HALF, roundings=1)
    yield BenchCase(
        _INT8[0], "codes", _int8pack, peer=True, multiples=(32, 64), tokens=(1, 64), dtypes=_HALF, roundings=1
    )
    # As a model in PyTorch alone would be run, one token at a time.
    alone: dict[str, Any] = {
        "peer": True,
        "compiled": "max-autotune-no-cudagraphs",
        "tokens": (1, 1),
        "dtypes": _HALF,
        "roundings": 1,
    }
    yield BenchCase(_INT8[1], "codes", _int8_cast, **alone)
    yield BenchCase(_FP8[0], "codes", _fp8_cast, **alone)


_HALF = (torch.bfloat16,)


def _case(
    name: str,
    bits: int,
    group: int,
    kind: str = "integer",
    *,
    zeros: bool = False,
    rank: int = 0,
    against: tuple[str, ...] = (),
    timed: bool = True,
) -> BenchCase:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        return _laid_out(rows, inputs, dtype, device, bits, group, kind, zeros=zeros, rank=rank)

    # Written out, a weight is rounded; so are what stands between factors and the product that theirs is added to.
    return BenchCase(name, "codes", prepare, against=against, roundings=3 if rank else 1, timed=timed)


def _laid_out(
    rows: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    bits: int,
    group: int,
    kind: str,
    *,
    zeros: bool,
    rank: int,
) -> Prepared:
    group = 0 if group >= inputs else group
    groups = -(-inputs // group) if group else 1
    codes = torch.randint(0, 2**bits, (rows, inputs), dtype=torch.uint8, device=device)
    if kind == "float":
        codes = torch.where(codes % 128 == 127, 0, codes)  # not a number
    words, high_words = to_lanes(codes, bits)
    held = {"values": words, "scale": (torch.rand(groups, rows, device=device) + 0.5) / (inputs**0.5 * 2 ** (bits - 2))}
    if high_words is not None:
        held["high_values"] = high_words
    if zeros:
        zero = torch.randint(0, 2**bits, (groups, rows), device=device) - (128 if bits == 8 else 0)
        held["zero"] = zero.to(torch.bfloat16)
    if kind in ("pairs", "table"):
        held["table"] = torch.randn(2**bits, device=device).to(dtype)
        if dtype.itemsize == 2 and kind == "pairs":
            held["pairs"] = pairs_of(held["table"])
    if rank:
        held["left"] = (torch.randn(rows, rank, device=device) / rank**0.5).to(dtype)
        held["right"] = (torch.randn(rank, inputs, device=device) / inputs**0.5).to(dtype)
    of = "integer" if kind == "integer" else "float" if kind == "float" else "table"

    def runs(few: int) -> Run:
        def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            parts = [given.get(name) for name in ("high_values", "scale", "zero", "table", "pairs")]
            y: Tensor = dequantizing_matmul(
                x, given["values"], *parts, None, given.get("left"), given.get("right"), bits, group, of, few
            )
            return y

        return run

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        numbers = codes.view(torch.float8_e4m3fn).float().double() if of == "float" else codes.double()
        if of == "table":
            numbers = given["table"].double()[codes.int()]
        elif of == "integer":
            numbers -= 2 ** (bits - 1) if not zeros or bits == 8 else 0
            if zeros:
                numbers -= _spread(given["zero"].double(), inputs, group)
        y: Tensor = x @ numbers.mul_(_spread(given["scale"].double(), inputs, group)).T
        return y + x @ given["right"].T @ given["left"].T if rank else y

    work = moved(held, rows, inputs, weights=rows * inputs + rank * (rows + inputs))
    learned = ("left", "right") if rank else ()
    return Prepared(held, runs(0), meant, work, ways={"written out": runs(1)}, learned=learned)


def _spread(per_group: Tensor, inputs: int, group: int) -> Tensor:
    """What each group has, (groups, m), for each input: (m, n)."""
    return per_group.T.repeat_interleave(group or inputs, 1)[:, :inputs]


def _scaled(rows: int, inputs: int, device: torch.device) -> Tensor:
    return (torch.rand(rows, device=device) + 0.5) / (64 * math.sqrt(inputs))


def _int4pack(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    if device.type != "cuda":
        raise NotImplementedError("its layout of codes is that of CUDA")
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8, device=device)
    scale = ((torch.rand(inputs // 128, rows, device=device) + 0.5) / (4 * inputs**0.5)).to(dtype)
    # Two codes a byte, the first in its upper half; scales and what is added to (code - 8) scale stand side by side.
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    held = {"values": packed, "scale": torch.stack((scale, torch.zeros_like(scale)), 2).contiguous()}

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, given["values"], 128, given["scale"])
        return y

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ ((codes.double() - 8) * _spread(given["scale"][..., 0].double(), inputs, 128)).T

    return Prepared(held, run, meant, moved(held, rows, inputs))


def _eight(values: Tensor, rows: int, inputs: int, device: torch.device, run: Run) -> Prepared:
    held = {"values": values, "scale": _scaled(rows, inputs, device).to(torch.bfloat16)}

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ given["values"].float().double().T * given["scale"].double()

    return Prepared(held, run, meant, moved(held, rows, inputs))


def _integers(rows: int, inputs: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)


def _int8pack(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, given["values"], given["scale"])
        return y

    return _eight(_integers(rows, inputs, device), rows, inputs, device, run)


def _cast(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, given["values"].to(x.dtype)) * given["scale"]


def _int8_cast(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    return _eight(_integers(rows, inputs, device), rows, inputs, device, _cast)


def _fp8_cast(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    values = (torch.randn(rows, inputs, device=device) * 32).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return _eight(values, rows, inputs, device, _cast)
