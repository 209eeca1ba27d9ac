"""Gated inputs: the cut, the operation, and the Triton kernels (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recast
from recast.kernels.gated_matmul import reference
from recast.kernels.gated_matmul.gated_op import gated_matmul
from recast.kernels.gated_matmul.launch import FEW, launch
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def columns_of(n: int, m: int, dtype: torch.dtype) -> Tensor:
    """(n, m) between NaN, as nothing beside it may be read."""
    around = torch.full((n, m + 9), float("nan"), dtype=dtype, device=DEVICE)
    around[:, 3 : 3 + m] = torch.randn(n, m)
    return around[:, 3 : 3 + m]


def expected(x: Tensor, columns: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, x, 0).double() @ columns.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_kernel_by_number(tokens: int, splits: int, dtype: torch.dtype) -> None:
    columns = columns_of(100, 141, dtype)
    norms = columns.float().norm(dim=1)
    x = torch.full((tokens, 130), float("nan"), dtype=dtype, device=DEVICE)[:, 20:120]
    x.copy_(torch.randn(tokens, 100))
    bias = torch.randn(141, device=DEVICE).to(dtype)
    y = launch(x, columns, norms, 37, None, bias, splits=splits)
    scores = x.float().abs() * norms
    keep = scores >= scores.sort(descending=True).values[:, 36:37]
    assert int(keep.sum()) >= 37 * tokens
    assert_close(y, expected(x, columns, keep) + bias.double(), terms=38)


@pytest.mark.parametrize("tokens", [1, 4])
def test_kernel_by_threshold(tokens: int) -> None:
    columns = columns_of(63, 60, torch.bfloat16)
    x = torch.randn(tokens, 63, device=DEVICE).to(torch.bfloat16)
    x[0, 5] = 0.5  # not above it
    y = launch(x, columns, None, 20, 0.5, None)
    assert_close(y, expected(x, columns, x.abs() > 0.5), terms=63)


@pytest.mark.parametrize("kept", [1, 5, 100])
def test_the_cut_among_equal_and_zero_scores(kept: int) -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 1e-30, 3e38, 2.0, -2.0, 0.0]).repeat(13)[:100]
    x = torch.stack([values, torch.zeros(100), torch.full((100,), -7.0)]).to(DEVICE)
    columns = torch.eye(100, device=DEVICE)
    y = launch(x, columns, None, kept, None, None)
    cuts = x.abs().sort(descending=True).values[:, kept - 1 : kept]
    assert torch.equal(y, torch.where(x.abs() >= cuts, x, 0))
    assert torch.equal(reference.cuts_of(x, None, kept), cuts[:, 0])


def test_columns_that_nobody_wants_are_not_read() -> None:
    columns = columns_of(40, 33, torch.float32)
    columns[7:30] = float("nan")
    x = torch.randn(2, 40, device=DEVICE)
    x[:, 7:30] *= 1e-6
    y = launch(x, columns, None, 17, None, None)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 2), (FEW + 1,)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_operation(tokens: tuple[int, ...], threshold: float | None) -> None:
    columns = columns_of(60, 33, torch.bfloat16)
    norms = columns.float().norm(dim=1)
    x, bias = torch.randn(*tokens, 60, device=DEVICE).bfloat16(), torch.randn(33, device=DEVICE).bfloat16()
    y = gated_matmul(x, columns, norms, 20, threshold, bias)
    assert y.shape == (*tokens, 33)
    keep = reference.keeps(x, norms, 20, threshold)
    assert_close(y, expected(x, columns, keep) + bias.double(), terms=61)


@pytest.mark.parametrize("tokens", [2, FEW + 2])
def test_operation_for_compilers_and_its_gradients(tokens: int) -> None:
    columns = torch.randn(20, 12, device=DEVICE)
    x = torch.randn(tokens, 20, device=DEVICE, requires_grad=True)
    bias = torch.randn(12, device=DEVICE, requires_grad=True)
    out = torch.randn(tokens, 12, device=DEVICE)
    to_x, to_bias = torch.autograd.grad(gated_matmul(x, columns, None, 7, None, bias), (x, bias), out)
    keep = reference.keeps(x, None, 7, None)
    assert_close(to_x, torch.where(keep, out.double() @ columns.double().T, 0), terms=12)
    assert_close(to_bias, out.double().sum(0), terms=tokens)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gated_matmul, (x, columns, None, 7, None, bias), test_utils=checks)


@pytest.mark.parametrize("text", ["wina(0.5)", "teal(0.5)", "wina(0.5) | int4"])
def test_served_by_the_target(text: str) -> None:
    from recast.lowering.triton.kernels import choose
    from recast.lowering.triton.serving.gated import GATED

    weight = torch.randn(24, 36, device=DEVICE)
    operator = recast.Form.parse(text).fit(weight)
    kernel, packed, _ = choose(operator)
    assert (GATED in kernel) == ("|" not in text)
    x = torch.randn(3, 36, device=DEVICE)
    assert_close(packed.apply(x), operator.apply(x), terms=36)
