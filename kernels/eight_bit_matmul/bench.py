"""Eight bits times eight bits, with the rounding of x; beside them PyTorch's own products of such numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.quantized_matmul.floats import FloatGrid, rounded_product
from recast.kernels.quantized_matmul.reference import quantize_tokens
from recast.kernels.timed import BenchCase, Prepared, moved

__all__ = ["cases"]

# From codes and a weight of eight bits and the rows' scales to scaled sums in float32.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
_E4M3 = FloatGrid(mantissa=3, lowest=-6, largest=448.0)
_INTEGERS, _FLOATS = "torch _int_mm, x rounded", "torch _scaled_mm, x rounded"


def cases() -> Iterator[BenchCase]:
    """Integers and e4m3 floats, whose inputs are rounded by token, and the peers with the same rounding."""
    for name, floats, against in (("int8 x int8", False, _INTEGERS), ("fp8 x fp8", True, _FLOATS)):
        yield BenchCase(name, "eight bits", _ours(floats), against=(against,), gradients=False, compiled="default")
    # cuBLAS takes no fewer vectors of integers.
    yield BenchCase(
        _INTEGERS, "eight bits", _of_torch(False), peer=True, multiples=(8, 8), tokens=(17, 1 << 30),
        dtypes=(torch.bfloat16,), gradients=False, compiled="default",
    )  # fmt: skip
    yield BenchCase(
        _FLOATS, "eight bits", _of_torch(True), peer=True, multiples=(16, 16),
        dtypes=(torch.bfloat16,), gradients=False, compiled="default", roundings=1,
    )  # fmt: skip


def _ours(floats: bool) -> Callable[[int, int, torch.dtype, torch.device], Prepared]:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        return _laid_out(rows, inputs, device, eight_bit_matmul, floats=floats)

    return prepare


def _of_torch(floats: bool) -> Callable[[int, int, torch.dtype, torch.device], Prepared]:
    def integers(codes: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return torch._int_mm(codes, values.T).float() * scale

    def small_floats(codes: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        one = torch.ones(codes.shape[0], 1, device=codes.device)  # scaled by token after it, as everywhere here
        return torch._scaled_mm(codes, values.T, one, scale.unsqueeze(0), out_dtype=torch.bfloat16, use_fast_accum=True)

    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        return _laid_out(rows, inputs, device, small_floats if floats else integers, floats=floats)

    return prepare


def _laid_out(rows: int, inputs: int, device: torch.device, product: Product, *, floats: bool) -> Prepared:
    if floats:
        values = (torch.randn(rows, inputs, device=device) * 32).clamp_(-448, 448).to(torch.float8_e4m3fn)
    else:
        values = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)
    scale = (torch.rand(rows, device=device) + 0.5) / (64 * inputs**0.5)
    held = {"values": values, "scale": scale}
    if not floats:
        held["offset"] = values.sum(1, dtype=torch.int32).float() * scale

    def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        def multiplied(codes: Tensor) -> Tensor:
            return product(codes.to(given["values"].dtype), given["values"], given["scale"])

        if floats:
            return rounded_product(x, _E4M3, multiplied)
        codes, of_token, zero = quantize_tokens(x)
        return ((multiplied(codes) - zero * given["offset"]) * of_token).to(x.dtype)

    def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Rounded as in float32, so that ties fall the same way; multiplied in float64."""

        def multiplied(codes: Tensor) -> Tensor:
            return codes.double() @ given["values"].float().double().T * given["scale"].double()

        if floats:
            return rounded_product(x.float(), _E4M3, multiplied).double()
        codes, of_token, zero = quantize_tokens(x.float())
        return multiplied(codes.double() - zero.double()) * of_token.double()

    return Prepared(held, run, meant, moved(held, rows, inputs, rate="fp8" if floats else "int8"))
