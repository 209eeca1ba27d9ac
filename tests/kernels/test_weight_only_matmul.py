"""Packed weights on a CPU: codes decoded in registers, or written out, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recast.kernels.native import load_library, why_not
from recast.kernels.quantized_matmul import rounded_tokens
from recast.kernels.quantized_matmul.blocks import block_count, from_blocks, to_blocks
from recast.kernels.quantized_matmul.few_tokens import unavailable, write_out
from recast.kernels.quantized_matmul.weight_only_op import weight_only_matmul
from tests.helpers import assert_close

SHAPES = [(1, 1), (5, 31), (63, 60), (64, 128), (33, 577), (130, 200)]  # rows, inputs
TOKENS = [1, 2, 3, 4, 7, 8, 13, 24]


def weight(
    rows: int, features: int, bits: int, group: int, kind: str, *, seed: int = 0
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """A weight in float64, and its parts as the operation takes them."""
    torch.manual_seed(seed)
    groups = -(-features // group) if group else 1
    codes = torch.randint(0, 2**bits, (rows, features))
    scale = torch.rand(rows, groups) + 0.5
    zero = torch.randint(0, 2**bits, (rows, groups)).float() if kind == "zeros" else None
    table = torch.randn(2**bits) if kind == "table" else None
    spread = torch.arange(features) // (group or features)
    if table is not None:
        numbers = table[codes].double()
    else:
        numbers = codes.double() - (2.0 ** (bits - 1) if zero is None else zero[:, spread].double())
    return numbers * scale[:, spread].double(), (to_blocks(codes, bits, group), scale, zero, table)


def test_they_run_here() -> None:
    assert why_not() is None
    assert unavailable() is None
    assert rounded_tokens.unavailable() is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("features", [1, 31, 32, 60, 577])
def test_blocks_hold_what_was_put_in(bits: int, features: int) -> None:
    codes = torch.randint(0, 2**bits, (7, features), dtype=torch.uint8)
    for group in (0, 32, 128):
        packed = to_blocks(codes, bits, group)
        assert packed.shape == (7, 4 * bits * block_count(features, group))
        assert torch.equal(from_blocks(packed, bits, features), codes)


def test_groups_that_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="groups of 48 do not divide so; 32, 64 or 128 would"):
        to_blocks(torch.zeros(2, 96, dtype=torch.uint8), 4, 48)


@pytest.mark.parametrize("kind", ["middle", "zeros", "table"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_products(kind: str, bits: int, group: int) -> None:
    for rows, features in SHAPES:
        wanted, parts = weight(rows, features, bits, group, kind)
        for tokens in TOKENS:
            x = torch.randn(tokens, features)
            for few in (tokens, 0):  # in registers, and written out
                y = weight_only_matmul(x, *parts, None, bits, few)
                # Zero points are taken off after summing: of terms as large as the numbers with theirs.
                assert_close(y / 2**bits, (x.double() @ wanted.T) / 2**bits, terms=features)


@pytest.mark.parametrize("kind", ["middle", "zeros"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_products_of_rounded_vectors(kind: str, bits: int, group: int) -> None:
    for rows, features in SHAPES:
        wanted, parts = weight(rows, features, bits, group, kind)
        for tokens in TOKENS:
            x = torch.randn(tokens, features)
            x[:, ::7] *= 30
            y = weight_only_matmul(x, *parts, None, bits, tokens, True)
            expected = rounded_tokens.reference(x, group).double() @ wanted.T
            assert_close(y / 2**bits / 30, expected / 2**bits / 30, terms=features)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_codes_and_vectors_do_not_overflow(bits: int) -> None:
    codes = torch.full((3, 4096), 2**bits - 1)
    codes[1] = 0
    codes[2, ::2] = 0
    parts = (to_blocks(codes, bits, 0), torch.ones(3, 1), None, None)
    x = torch.full((5, 4096), 2.0)
    x[1::2] = -2.0
    wanted = codes.double() - 2 ** (bits - 1)
    y = weight_only_matmul(x, *parts, None, bits, 5, True)
    assert_close(y / 2**bits, x.double() @ wanted.T / 2**bits, terms=4096)


def test_rounded_vectors_that_are_zero_tiny_or_not_finite() -> None:
    wanted, parts = weight(9, 96, 4, 32, "zeros")
    x = torch.randn(5, 96)
    x[0], x[1, 32:64], x[2] = 0, 0, 1e-37
    x[3, 5], x[4, 90] = torch.nan, -torch.inf
    y = weight_only_matmul(x, *parts, None, 4, 5, True)
    expected = rounded_tokens.reference(x[:2], 32).double() @ wanted.T
    assert_close(y[:2] / 16, expected / 16, terms=96)
    assert float(y[2].abs().max()) < 1e-33
    assert bool(torch.isnan(y[3:]).all())


def test_a_weight_that_is_kept_dense_serves_many_tokens() -> None:
    wanted, parts = weight(33, 60, 4, 32, "zeros")
    other = torch.randn(33, 60)  # not the same, so that the difference shows
    x = torch.randn(5, 60)
    assert_close(weight_only_matmul(x, *parts, other, 4, 8), x.double() @ wanted.T, terms=60)
    assert_close(weight_only_matmul(x, *parts, other, 4, 4), x.double() @ other.double().T, terms=60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("few", [0, 64])
def test_other_dtypes(dtype: torch.dtype, few: int) -> None:
    wanted, parts = weight(63, 60, 4, 32, "middle")
    x = torch.randn(2, 3, 60).to(dtype)
    y = weight_only_matmul(x, *parts, None, 4, few)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 63))
    rounded = y.float() if dtype == torch.float64 else y
    assert_close(rounded, x.double() @ wanted.T, terms=60)


@pytest.mark.parametrize("few", [0, 64])
def test_operands_that_lie_apart_between_nan(few: int) -> None:
    wanted, parts = weight(33, 60, 4, 32, "zeros")
    room = torch.full((9, 200), torch.nan)
    x = room[1:8:2, 3:183:3]
    x.copy_(torch.randn(4, 60))
    assert_close(weight_only_matmul(x, *parts, None, 4, few), x.double() @ wanted.T, terms=60)


def test_no_tokens_and_a_vector() -> None:
    wanted, parts = weight(33, 60, 4, 0, "middle")
    for few in (0, 8):
        assert weight_only_matmul(torch.zeros(0, 60), *parts, None, 4, few).shape == (0, 33)
        x = torch.randn(60)
        assert_close(weight_only_matmul(x, *parts, None, 4, few), wanted @ x.double(), terms=60)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    _, parts = weight(33, 60, 4, 32, "zeros")
    x = torch.randn(3, 60)
    x[1, 7] = value
    y = weight_only_matmul(x, *parts, None, 4, 8)
    assert torch.isfinite(y[[0, 2]]).all()
    assert not torch.isfinite(y[1]).any()


def test_rows_written_out() -> None:
    wanted, (codes, scale, zero, table) = weight(70, 577, 3, 128, "zeros")
    assert codes is not None
    assert scale is not None
    found = write_out(codes, scale, zero, table, bits=3, features=577, rows=range(11, 64))
    assert_close(found, wanted[11:64], terms=2)
    halves = write_out(codes, scale, zero, table, bits=3, features=577, rows=range(11, 64), dtype=torch.bfloat16)
    assert torch.equal(halves, found.bfloat16())


@pytest.mark.parametrize("kind", ["middle", "zeros", "table"])
def test_gradients(kind: str) -> None:
    wanted, parts = weight(33, 60, 4, 32, kind)
    x = torch.randn(2, 3, 60, requires_grad=True)
    (weight_only_matmul(x, *parts, None, 4, 8) * (direction := torch.randn(2, 3, 33))).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, direction.double() @ wanted, terms=33)


def test_the_operation_keeps_its_promises() -> None:
    _, parts = weight(33, 60, 4, 32, "zeros")
    given = (torch.randn(3, 60, requires_grad=True), *parts, None, 4, 8)
    torch.library.opcheck(weight_only_matmul, given)


def test_any_number_of_tokens_is_one_graph() -> None:
    wanted, parts = weight(33, 60, 4, 32, "middle")
    compiled = torch.compile(
        lambda x: weight_only_matmul(x, *parts, None, 4, 4), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    compiled(torch.randn(3, 60))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 9, 5):
            x = torch.randn(tokens, 60)
            assert_close(compiled(x), x.double() @ wanted.T, terms=60)


def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int f(void) { return }", encoding="utf-8")
    with pytest.raises(OSError, match=r"(?s)does not compile broken\.c: .*error"):
        load_library(source, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.so"))
