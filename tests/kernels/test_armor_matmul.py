"""A 2:4 core between two block-diagonal matrices: the operation and its Triton kernels (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.armor_matmul.armor_op import armor_matmul
from recast.kernels.armor_matmul.launch import launch
from recast.kernels.armor_matmul.reference import blocks_matmul
from recast.kernels.block_diagonal_matmul.launch import TILES as BLOCK_TILES
from recast.kernels.block_diagonal_matmul.launch import launch as launch_blocks
from recast.kernels.block_diagonal_matmul.reference import block_diagonal_to_dense
from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.tiles import TILES, Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def core(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 matrix (m, n), n a multiple of 4, and its lane order."""
    places = torch.rand(m, n // 4, 4).argsort(-1)[..., :2].sort(-1).values
    values = torch.randn(m, n // 4, 2).to(dtype)
    dense = torch.zeros(m, n // 4, 4, dtype=dtype).scatter(2, places, values).reshape(m, n)
    words, marks = to_lanes(values.reshape(m, -1), places.reshape(m, -1))
    return dense.to(DEVICE), words.to(DEVICE), marks.to(DEVICE)


def blocks(size: int, side: int, dtype: torch.dtype) -> Tensor:
    """Blocks on a diagonal for a side of so many, NaN beyond it."""
    found = torch.randn(-(-size // side), side, side).to(dtype)
    if size % side:
        found[-1, size % side :], found[-1, :, size % side :] = float("nan"), float("nan")
    return found.to(DEVICE)


def dense(stack: Tensor, size: int) -> Tensor:
    """The block-diagonal matrix (size, size)."""
    return block_diagonal_to_dense(stack)[:size, :size]


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in BLOCK_TILES["cuda"])], ids=str)
@pytest.mark.parametrize("side", [8, 20, 40])
@pytest.mark.parametrize("tokens", [1, 33])
def test_blocks_of_every_tile(tile: Tile, side: int, tokens: int) -> None:
    stack = blocks(63, side, torch.bfloat16)
    x = torch.randn(tokens, 63, dtype=torch.bfloat16, device=DEVICE)
    found = launch_blocks(x, stack, None, 63, tile=tile)
    assert_close(found, x.double() @ dense(stack, 63).double().T, terms=side)


@pytest.mark.parametrize("sums", [2, 5])
@pytest.mark.parametrize("as_loaded", [False, True])
def test_blocks_of_vectors_in_sums(sums: int, as_loaded: bool) -> None:
    stack = blocks(63, 20, torch.float16)
    x = torch.randn(sums, 3, 70, device=DEVICE)[..., :63]
    bias = torch.randn(63, dtype=torch.float16, device=DEVICE)
    found = launch_blocks(x, stack, bias, 63, as_loaded=as_loaded)
    assert_close(found, x.sum(0).double() @ dense(stack, 63).double().T + bias.double(), terms=20)


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"])], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_kernel_of_every_tile(tile: Tile, fused: bool, tokens: int) -> None:
    matrix, words, marks = core(75, 300, torch.bfloat16)
    left, right = blocks(75, 16, torch.bfloat16), blocks(300, 16, torch.bfloat16)
    x = torch.randn(tokens, 300, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.randn(75, dtype=torch.bfloat16, device=DEVICE)
    weight = dense(left, 75).double() @ matrix.double() @ dense(right, 300).double()
    found = launch(x, words, marks, left, right, bias, tile=tile, fused=fused)
    assert_close(found, x.double() @ weight.T + bias.double(), terms=150)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_splits_and_vectors_far_apart(splits: int, dtype: torch.dtype) -> None:
    matrix, words, marks = core(33, 580, dtype)
    left, right = blocks(33, 32, dtype), blocks(580, 32, dtype)
    x = torch.full((3, 700), float("nan"), dtype=dtype, device=DEVICE)[:, 60:640]
    x.copy_(torch.randn(3, 580))
    weight = dense(left, 33).double() @ matrix.double() @ dense(right, 580).double()
    found = launch(x, words, marks, left, right, None, tile=SMALL, splits=splits)
    assert_close(found, x.double() @ weight.T, terms=290)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (65,)], ids=str)
def test_operation(tokens: tuple[int, ...]) -> None:
    matrix, words, marks = core(33, 64, torch.bfloat16)
    left, right = torch.randn(3, 16, 16).bfloat16().to(DEVICE), torch.randn(4, 16, 16).bfloat16().to(DEVICE)
    x = torch.randn(*tokens, 64, dtype=torch.bfloat16, device=DEVICE)
    weight = dense(left, 33).double() @ matrix.double() @ dense(right, 64).double()
    y = armor_matmul(x, words, marks, left, right, None)
    assert y.shape == (*tokens, 33)
    assert_close(y, x.double() @ weight.T, terms=64)


def test_operation_for_compilers_and_its_gradients() -> None:
    matrix, words, marks = core(11, 16, torch.float16)
    operands = [
        torch.randn(shape).to(torch.float16).to(DEVICE).requires_grad_()
        for shape in ((3, 16), (2, 8, 8), (4, 4, 4), (11,))
    ]
    x, left, right, bias = operands
    out = torch.randn(3, 11, dtype=torch.float16, device=DEVICE)
    found = torch.autograd.grad(armor_matmul(x, words, marks, left, right, bias), operands, out)
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    inner = blocks_matmul(wide[0], wide[2]) @ matrix.double().T
    wanted = torch.autograd.grad(blocks_matmul(inner, wide[1]) + wide[3], wide, out.double())
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, terms=16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(armor_matmul, (x, words, marks, left, right, bias), test_utils=checks)
