"""Gated inputs: the cut, products with columns, and their Triton kernels (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import recast
from recast.kernels.gated_matmul import reference
from recast.kernels.gated_matmul.gated_op import columns_matmul, gate_cuts
from recast.kernels.gated_matmul.launch import FEW, launch_columns, launch_cuts
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def columns_of(n: int, m: int, dtype: torch.dtype) -> Tensor:
    """(n, m) between NaN, as nothing beside it may be read."""
    around = torch.full((n, m + 9), float("nan"), dtype=dtype, device=DEVICE)
    around[:, 3 : 3 + m] = torch.randn(n, m)
    return around[:, 3 : 3 + m]


def inputs(tokens: int, n: int, dtype: torch.dtype) -> Tensor:
    """(tokens, n), half of them zero, between NaN."""
    x = torch.full((tokens, n + 30), float("nan"), dtype=dtype, device=DEVICE)[:, 20 : 20 + n]
    return x.copy_(torch.randn(tokens, n) * (torch.rand(tokens, n) < 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", range(1, FEW + 1))
@pytest.mark.parametrize("splits", [1, 3, None])
def test_kernel_of_columns(tokens: int, splits: int | None, dtype: torch.dtype) -> None:
    columns, x = columns_of(100, 301, dtype), inputs(tokens, 100, dtype)
    bias = torch.randn(301, device=DEVICE).to(dtype)
    y = launch_columns(x, columns, bias, splits=splits)
    assert_close(y, x.double() @ columns.double() + bias.double(), terms=101)


def test_columns_of_zeros_are_not_read() -> None:
    columns, x = columns_of(40, 33, torch.float32), torch.randn(2, 40, device=DEVICE)
    columns[7:30] = float("nan")
    x[:, 7:30] = 0
    assert bool(torch.isfinite(launch_columns(x, columns, None)).all())
    x[1, 9] = 1
    assert bool(
        torch.isnan(launch_columns(x, columns, None)).all()
    )  # read for one of them, multiplied for both, as any product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [1, 37, 100])
def test_kernel_of_cuts(kept: int, dtype: torch.dtype) -> None:
    x, norms = inputs(3, 100, dtype), torch.rand(100, device=DEVICE)
    for scale in (norms, None):
        scores = x.float().abs() * (1 if scale is None else scale)
        assert torch.equal(launch_cuts(x, scale, kept), scores.sort(descending=True).values[:, kept - 1])


@pytest.mark.parametrize("kept", [1, 5, 13, 14, 100])
def test_cuts_among_equal_and_extreme_scores(kept: int) -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 1e-42, 3e38, 2.0, -2.0, 0.0]).repeat(13)[:100]
    x = torch.stack([values, torch.zeros(100), torch.full((100,), -7.0)]).to(DEVICE)
    cuts = x.abs().sort(descending=True).values[:, kept - 1]
    assert torch.equal(launch_cuts(x, None, kept), cuts)
    assert torch.equal(reference.cuts_of(x, None, kept), cuts)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 2), (FEW + 1,)], ids=str)
def test_operations(tokens: tuple[int, ...]) -> None:
    columns = columns_of(60, 33, torch.bfloat16)
    x, bias = torch.randn(*tokens, 60, device=DEVICE).bfloat16(), torch.randn(33, device=DEVICE).bfloat16()
    y = columns_matmul(x, columns, bias)
    assert y.shape == (*tokens, 33)
    assert_close(y, x.double() @ columns.double() + bias.double(), terms=61)
    cuts = gate_cuts(x, None, 20)
    assert cuts.shape == (*tokens, 1)
    assert torch.equal(cuts, x.float().abs().sort(descending=True).values[..., 19:20])


@pytest.mark.parametrize("tokens", [2, FEW + 2])
def test_operations_for_compilers_and_gradients(tokens: int) -> None:
    columns = torch.randn(20, 12, device=DEVICE, requires_grad=True)
    x = torch.randn(tokens, 20, device=DEVICE, requires_grad=True)
    bias = torch.randn(12, device=DEVICE, requires_grad=True)
    out = torch.randn(tokens, 12, device=DEVICE)
    operands = x, columns, bias
    to_x, to_columns, to_bias = torch.autograd.grad(columns_matmul(*operands), operands, out)
    assert_close(to_x, out.double() @ columns.double().T, terms=12)
    assert_close(to_columns, x.double().T @ out.double(), terms=tokens)
    assert_close(to_bias, out.double().sum(0), terms=tokens)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(columns_matmul, (x, columns, bias), test_utils=checks)
    torch.library.opcheck(gate_cuts, (x.detach(), None, 7), test_utils=checks)


def test_gradients_in_float64() -> None:
    sizes = ((FEW + 1, 4), (4, 3), (3,))
    operands = [torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(columns_matmul, operands)


@pytest.mark.parametrize("tokens", [3, FEW + 2])
@pytest.mark.parametrize("text", ["wina(0.5)", "teal(0.5)", "wina(0.5) | int4"])
def test_served_by_the_target(text: str, tokens: int) -> None:
    from recast.lowering.triton.kernels import choose
    from recast.lowering.triton.serving.gated import GATED

    weight = torch.randn(24, 36, device=DEVICE)
    stats = recast.passes.forms.Stats.from_inputs(torch.randn(100, 36)) if "teal" in text else None
    operator = recast.Form.parse(text).fit(weight, stats)
    kernel, packed, _ = choose(operator)
    assert (GATED in kernel) == ("|" not in text)
    x = torch.randn(tokens, 36, device=DEVICE, requires_grad=True)
    wide = x.detach().requires_grad_()
    assert_close(packed.apply(x), operator.apply(wide), terms=36)
    packed.apply(x).sum().backward()
    operator.apply(wide).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert_close(x.grad, wide.grad, terms=24)
