"""2:4 weights: layout, the operation, and the Triton kernel (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.sparse_matmul.lanes import from_lanes, to_lanes
from recast.kernels.sparse_matmul.launch import launch
from recast.kernels.sparse_matmul.sparse24_op import sparse24_matmul
from recast.kernels.tiles import TILES, Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def weight(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 matrix (m, n), n a multiple of 4, and its lane order."""
    keys = torch.rand(m, n // 4, 4)
    places = keys.argsort(-1)[..., :2].sort(-1).values
    values = torch.randn(m, n // 4, 2).to(dtype)
    dense = torch.zeros(m, n // 4, 4, dtype=dtype).scatter(2, places, values).reshape(m, n)
    words, marks = to_lanes(values.reshape(m, -1), places.reshape(m, -1))
    return dense.to(DEVICE), words.to(DEVICE), marks.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [4, 60, 128, 580])
def test_lane_order_is_undone_and_small(features: int, dtype: torch.dtype) -> None:
    dense, words, marks = weight(5, features, dtype)
    assert torch.equal(from_lanes(words, marks, dtype, features), dense)
    blocks = -(-features // 128)
    assert words.nbytes + marks.nbytes == 5 * blocks * 128 * 2 * 9 // 16


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"])], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_kernel_of_every_tile(tile: Tile, tokens: int) -> None:
    dense, words, marks = weight(77, 300, torch.bfloat16)
    x = torch.randn(tokens, 300, dtype=torch.bfloat16, device=DEVICE)
    assert_close(launch(x, words, marks, None, tile=tile), x.double() @ dense.double().T, terms=150)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_kernel_with_bias_splits_and_rows_far_apart(splits: int, dtype: torch.dtype) -> None:
    dense, words, marks = weight(33, 580, dtype)
    x = torch.full((3, 700), float("nan"), dtype=dtype, device=DEVICE)[:, 60:640]
    x.copy_(torch.randn(3, 580))
    around = torch.full((33, 512), -1, dtype=torch.int32, device=DEVICE)
    around[:, 32 : 32 + words.shape[1]] = words
    bias = torch.randn(33, dtype=dtype, device=DEVICE)
    y = launch(x, around[:, 32 : 32 + words.shape[1]], marks, bias, tile=SMALL, splits=splits)
    assert_close(y, x.double() @ dense.double().T + bias.double(), terms=291)


@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3)])
def test_operation(tokens: tuple[int, ...]) -> None:
    dense, words, marks = weight(33, 64, torch.bfloat16)
    x = torch.randn(*tokens, 64, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.randn(33, dtype=torch.bfloat16, device=DEVICE)
    y = sparse24_matmul(x, words, marks, bias)
    assert y.shape == (*tokens, 33)
    assert_close(y, x.double() @ dense.double().T + bias.double(), terms=33)


def test_operation_for_compilers_and_its_gradients() -> None:
    dense, words, marks = weight(8, 16, torch.float16)
    x = torch.randn(3, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float16, device=DEVICE, requires_grad=True)
    out = torch.randn(3, 8, dtype=torch.float16, device=DEVICE)
    to_x, to_bias = torch.autograd.grad(sparse24_matmul(x, words, marks, bias), (x, bias), out)
    assert_close(to_x, out.double() @ dense.double(), terms=8)
    assert_close(to_bias, out.double().sum(0), terms=3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sparse24_matmul, (x, words, marks, bias), test_utils=checks)
