"""Weights of low rank: the operation, and the Triton kernel of dense blocks that runs it (interpreted where there is no GPU)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul.launch import TILES
from recast.kernels.low_rank_matmul.launch import launch
from recast.kernels.low_rank_matmul.low_rank_op import bound_by_memory, low_rank_matmul
from recast.kernels.tiles import Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def factors(m: int, rank: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (m, rank) and (rank, n) that lie between NaN."""
    around = torch.full((m + n, rank + 2), float("nan"), dtype=dtype, device=DEVICE)
    around[:, 1:-1] = torch.randn(m + n, rank).to(dtype)
    return around[:m, 1:-1], around[m:, 1:-1].T


def expected(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64."""
    y = x.double() @ right.double().T @ left.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"][:-1])], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_kernel_of_every_tile(tile: Tile, dtype: torch.dtype, tokens: int) -> None:
    left, right = factors(77, 20, 63, dtype)
    x = torch.randn(tokens, 63, device=DEVICE).to(dtype)
    assert_close(launch(x, left, right, None, tile=tile), expected(x, left, right), terms=83)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("as_loaded", [False, True], ids=["sums by a launch", "sums as loaded"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_kernel_with_bias_splits_and_vectors_far_apart(splits: int, as_loaded: bool, dtype: torch.dtype) -> None:
    left, right = factors(33, 150, 580, dtype)
    x = torch.full((3, 700), float("nan"), dtype=dtype, device=DEVICE)[:, 60:640]
    x.copy_(torch.randn(3, 580))
    bias = torch.randn(33, device=DEVICE).to(dtype)
    y = launch(x, left, right, bias, tile=SMALL, splits=splits, as_loaded=as_loaded)
    assert_close(y, expected(x, left, right, bias), terms=730)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (bound_by_memory(torch.bfloat16) + 1,)], ids=str)
def test_operation(tokens: tuple[int, ...]) -> None:
    left, right = factors(33, 5, 60, torch.bfloat16)
    x = torch.randn(*tokens, 60, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.randn(33, dtype=torch.bfloat16, device=DEVICE)
    y = low_rank_matmul(x, left, right, bias)
    assert y.shape == (*tokens, 33)
    assert_close(y, expected(x, left, right, bias), terms=65)


@pytest.mark.parametrize("tokens", [3, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype, tokens: int) -> None:
    left, right = (factor.requires_grad_() for factor in factors(12, 5, 20, dtype))
    x = torch.randn(tokens, 20, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(12, device=DEVICE).to(dtype).requires_grad_()
    out = torch.randn(tokens, 12, device=DEVICE).to(dtype)
    operands = (x, left, right, bias)
    found = torch.autograd.grad(low_rank_matmul(*operands), operands, out)
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    wanted = torch.autograd.grad(expected(*wide), wide, out.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, terms=tokens + 20)


def test_gradients_in_float64_and_of_gradients() -> None:
    sizes = ((3, 4), (5, 2), (2, 4), (5,))
    operands = [torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(low_rank_matmul, operands)
    assert torch.autograd.gradgradcheck(low_rank_matmul, operands)


def test_gradients_of_gradients_through_the_kernel() -> None:
    x, left, right = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((3, 4), (5, 2), (2, 4)))

    def second(product: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, ...]:
        y = product(*operands).square().sum()
        return torch.autograd.grad(torch.autograd.grad(y, operands[0], create_graph=True)[0].square().sum(), operands)

    found = second(lambda *operands: low_rank_matmul(*operands, None), x, left, right)
    wide = [t.detach().double().requires_grad_() for t in (x, left, right)]
    for one, other in zip(found, second(expected, *wide), strict=True):
        assert_close(one, other, terms=100)


def test_operation_for_compilers() -> None:
    left, right = (factor.requires_grad_() for factor in factors(8, 3, 16, torch.float32))
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(low_rank_matmul, (x, left, right, None), test_utils=checks)
