"""Vectors rounded to bytes and their products with int8 weights on a CPU: codes as the reference has them, sums against float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul import rounded_rows
from recast.kernels.eight_bit_matmul.rounded_linear_op import round_rows, rounded_linear, rounded_linear_codes
from recast.kernels.epilogue.reference import ACTIVATIONS
from recast.kernels.native import load_library
from recast.kernels.quantized_matmul.ops import has_vnni
from recast.kernels.quantized_matmul.reference import quantize_inputs, quantize_tokens
from tests.helpers import assert_close

needs_vnni = pytest.mark.skipif(
    not has_vnni(), reason="this processor has no VNNI, which is what the kernel is made of"
)

SHAPES = [(1, 1, 1), (5, 31, 63), (63, 60, 577), (64, 128, 64), (200, 577, 65), (7, 64, 130)]  # tokens, inputs, outputs


def weight(outputs: int, features: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, int]]:
    """A weight in float64, and its parts as the operation takes them."""
    values = torch.randint(-127, 128, (outputs, features), dtype=torch.int8)
    scale = torch.rand(outputs) + 0.5
    filled = [torch.nn.functional.pad(t, (0, -outputs % 64)) for t in (scale, values.sum(1, dtype=torch.int32))]
    return values.double() * scale.double().unsqueeze(1), (rounded_rows.to_lanes(values), *filled, outputs)


def rounded(x: Tensor) -> Tensor:
    codes, scale, zero = quantize_tokens(x)
    return (codes.double() - zero.double()) * scale.double()


def test_it_runs_where_the_processor_has_vnni():
    assert (rounded_rows.unavailable() is None) == has_vnni()


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 31, 64, 577])
def test_codes(features, dtype):
    x = torch.cat(
        [torch.randn(9, features), torch.zeros(1, features), torch.full((1, features), 3.0), -torch.rand(1, features)]
    )
    x = x.to(dtype)
    codes, grid = round_rows(x, None)
    wanted, scale, zero = quantize_tokens(x)
    assert torch.equal(codes[:, :features].int() - 128, wanted.int())
    assert not codes[:, features:].any()
    assert torch.equal(grid, torch.cat([scale, zero + 128], 1))
    given = torch.tensor([0.01, 100.0])
    codes, same = round_rows(x, given)
    assert torch.equal(codes[:, :features].int() - 128, quantize_inputs(x, given[:1], given[1:] - 128).int())
    assert torch.equal(same, given)


@needs_vnni
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape):
    tokens, features, outputs = shape
    dense, parts = weight(outputs, features)
    x = torch.randn(tokens, features)
    bias, factor, residual = torch.randn(outputs), torch.randn(tokens, outputs), torch.randn(tokens, outputs)
    y = rounded_linear(*round_rows(x, None), *parts, torch.float32)
    assert_close(y, rounded(x) @ dense.T, terms=features)
    y = rounded_linear(*round_rows(x, None), *parts, torch.float32, bias, "relu", factor, residual)
    assert_close(
        y, torch.relu(rounded(x) @ dense.T + bias.double()) * factor.double() + residual.double(), terms=features
    )


@needs_vnni
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    values, scale = torch.tensor([[100]], dtype=torch.int8), torch.full((64,), 1e-2)
    x = torch.cat([torch.linspace(-30, 30, 501), torch.linspace(-0.5, 0.5, 101)]).unsqueeze(1)
    sums = torch.nn.functional.pad(values.sum(1, dtype=torch.int32), (0, 63))
    y = rounded_linear(*round_rows(x, None), rounded_rows.to_lanes(values), scale, sums, 1, torch.float32, None, name)
    assert_close(y, ACTIVATIONS[name][0](rounded(x)), factor=16)


@needs_vnni
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_what_is_rounded_at_once(tokens):
    _, parts = weight(70, 60)
    codes, grid = round_rows(torch.randn(2, tokens, 60), None)
    y = rounded_linear(codes, grid, *parts, torch.float32, torch.ones(70), "gelu")
    for following in (None, torch.tensor([0.05, 7.0])):
        found = rounded_linear_codes(codes, grid, *parts, torch.float32, torch.ones(70), "gelu", None, None, following)
        for a, b in zip(found, round_rows(y, following), strict=True):
            assert torch.equal(a, b)


@needs_vnni
def test_bfloat16():
    dense, parts = weight(70, 60)
    x, residual = torch.randn(33, 60).bfloat16(), torch.randn(33, 70).bfloat16()
    y = rounded_linear(*round_rows(x, None), *parts, torch.bfloat16, None, "", None, residual)
    assert y.dtype == torch.bfloat16
    assert_close(y, rounded(x) @ dense.T + residual.double(), terms=60)


@needs_vnni
def test_numbers_that_are_none_stay_so():
    _, parts = weight(3, 8)
    x = torch.randn(4, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    y = rounded_linear(*round_rows(x, None), *parts, torch.float32)
    assert y.isfinite().all(1).tolist() == [True, False, False, True]


@needs_vnni
def test_rows_that_are_apart():
    x = torch.randn(4, 7, 60)
    for view in (x[:, :, 10:40], x.transpose(1, 2)):
        codes, grid = round_rows(view, None)
        for a, b in zip((codes, grid), round_rows(view.contiguous(), None), strict=True):
            assert torch.equal(a, b)


@needs_vnni
@pytest.mark.parametrize("lead", [(0,), (2, 3)])
def test_the_operations(lead):
    _, parts = weight(70, 60)
    x = torch.randn(*lead, 60)
    grid = torch.tensor([0.05, 7.0])
    for given in (None, grid):
        torch.library.opcheck(torch.ops.recast.round_rows.default, (x, given))
        codes, found = round_rows(x, given)
        rest = (
            codes,
            found,
            *parts,
            torch.float32,
            torch.ones(70),
            "silu",
            torch.ones(*lead, 70),
            torch.ones(*lead, 70),
        )
        torch.library.opcheck(torch.ops.recast.rounded_linear.default, rest)
        torch.library.opcheck(torch.ops.recast.rounded_linear_codes.default, (*rest, given))


def test_a_compiler_that_has_no_such_instructions_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("recast.kernels.native._FLAGS", ("-O1", "-fopenmp", "-shared", "-fPIC", "-Wfatal-errors"))
    source = Path(rounded_rows.__file__).with_suffix(".c")
    with pytest.raises(OSError, match="needs VNNI"):
        load_library(source, tmp_path)


@needs_vnni
def test_half_as_wide_instructions(tmp_path, monkeypatch):
    """Processors with AVX-VNNI and without AVX-512, on one that has both."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if "avx_vnni" not in flags:
        pytest.skip("this processor has no AVX-VNNI")
    from recast.kernels import native

    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mavxvnni", "-mno-avx512f"))
    monkeypatch.setattr(rounded_rows._SOURCE, "_found", None)
    rounded_rows._SOURCE.use(load_library(Path(rounded_rows.__file__).with_suffix(".c"), tmp_path))
    for shape in SHAPES:
        test_products(shape)
    test_codes(577, torch.bfloat16)
    for name in ACTIVATIONS:
        test_activations(name)
    test_what_is_rounded_at_once(130)
