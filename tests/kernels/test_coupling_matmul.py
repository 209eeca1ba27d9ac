"""Coupled groups of features: the operation and the Triton kernel (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.coupling_matmul.coupling_op import coupling_matmul
from recast.kernels.coupling_matmul.launch import DTYPES, FEW, MANY, Piece, launch
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(x: Tensor, weights: Tensor) -> Tensor:
    """The definition, in float64."""
    groups = x.double().unflatten(1, weights.shape[1:])
    return torch.einsum("ijf,tjf->tif", weights.double(), groups).flatten(1)


def between_nan(tensor: Tensor) -> Tensor:
    """The same numbers as part of a tensor that is NaN elsewhere, contiguous along its last dimension."""
    around = torch.full([size + 7 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=DEVICE)
    inner = around[tuple(slice(3, 3 + size) for size in tensor.shape)]
    return inner.copy_(tensor)


@pytest.mark.parametrize("piece", [FEW, MANY, Piece(2, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 33), (5, 18, 7), (1, 1, 300)], ids=str)
def test_kernel_between_nan(sizes: tuple[int, int, int], dtype: torch.dtype, piece: Piece) -> None:
    weights = torch.randn(sizes, device=DEVICE).to(dtype)
    x = torch.randn(5, sizes[1] * sizes[2], device=DEVICE).to(dtype)
    wanted = expected(x, weights)
    assert_close(launch(between_nan(x), between_nan(weights), piece=piece), wanted, terms=sizes[1])
    # The gradient of x has groups exchanged, which is strides.
    turned = weights.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(launch(x, turned, piece=piece), wanted, terms=sizes[1])


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (17,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_operation(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    weights = torch.randn(3, 4, 5, dtype=dtype, device=DEVICE)
    x = torch.randn(*tokens, 20, dtype=dtype, device=DEVICE)
    y = coupling_matmul(x, weights)
    assert y.shape == (*tokens, 15)
    assert y.is_contiguous()
    assert_close(y, expected(x.reshape(-1, 20), weights).reshape(y.shape), terms=4)


@pytest.mark.parametrize("tokens", [0, 2, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype, tokens: int) -> None:
    weights = torch.randn(3, 4, 5, device=DEVICE).to(dtype).requires_grad_()
    x = torch.randn(tokens, 20, device=DEVICE).to(dtype).requires_grad_()
    out = torch.randn(tokens, 15, device=DEVICE).to(dtype)
    found = torch.autograd.grad(coupling_matmul(x, weights), (x, weights), out)
    wide = [t.detach().double().requires_grad_() for t in (x, weights)]
    for one, other in zip(found, torch.autograd.grad(expected(*wide), wide, out.double()), strict=True):
        assert one.dtype == dtype
        assert_close(one, other, terms=tokens + 4)


def test_gradients_in_float64_and_of_gradients() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weights = torch.randn(3, 4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(coupling_matmul, (x, weights))
    assert torch.autograd.gradgradcheck(coupling_matmul, (x, weights))


def test_operation_for_compilers() -> None:
    x = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    weights = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(coupling_matmul, (x, weights), test_utils=checks)
