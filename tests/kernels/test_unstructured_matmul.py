"""Values at any places: layout, the operation, and the Triton kernels (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.tiles import TILES, Tile
from recast.kernels.unstructured_matmul.lanes import BLOCK, ROWS, from_lanes, to_lanes
from recast.kernels.unstructured_matmul.launch import launch, write_out
from recast.kernels.unstructured_matmul.unstructured_op import unstructured_matmul
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def weight(m: int, n: int, dtype: torch.dtype, density: float = 0.5) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A matrix (m, n) with numbers at any places, and its lane order; one row has all of them, and one none."""
    dense = torch.randn(m, n) * (torch.rand(m, n) < density)
    dense[0], dense[m // 2] = torch.randn(n), 0
    dense = dense.to(dtype)
    return dense.to(DEVICE), tuple(tensor.to(DEVICE) for tensor in to_lanes(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 63), (60, 577), (520, 5)])
def test_lane_order_is_undone_and_small(m: int, n: int, density: float, dtype: torch.dtype) -> None:
    dense, held = weight(m, n, dtype, density)
    assert torch.equal(from_lanes(*held, m, n), dense)
    units = -(-m // ROWS) * -(-n // BLOCK)
    kept = int((dense != 0).sum())
    assert kept <= held[0].numel() <= kept + 7 * units + 8
    assert sum(part.nbytes for part in held[1:]) == units * (ROWS * BLOCK * 3 // 16 + 4)


def test_lane_order_by_its_definition() -> None:
    dense, (values, words, starts, offsets) = weight(32, 256, torch.float32)
    for row, column in torch.cartesian_prod(torch.arange(32), torch.arange(256))[::7].tolist():
        at = row // 2, column // 16
        word, bit = int(words[at]) & 0xFFFFFFFF, 16 * (row % 2) + column % 16
        before = sum(not word >> i & 1 for i in range(bit))
        first = 8 * int(offsets[row // 16, column // 128]) + int(starts[at])
        assert float(dense[row, column]) == (0 if word >> bit & 1 else float(values[first + before]))


def test_lane_order_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"torch.int64 \(4,\); floating \(m, n\) is needed"):
        to_lanes(torch.arange(4))


@pytest.mark.parametrize("tile", [SMALL, *(tile for most, tile in TILES["cuda"] if most <= 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_kernel_of_every_tile(tile: Tile, tokens: int) -> None:
    dense, held = weight(77, 300, torch.bfloat16)
    x = torch.randn(tokens, 300, dtype=torch.bfloat16, device=DEVICE)
    assert_close(launch(x, *held, None, 77, tile=tile), x.double() @ dense.double().T, terms=300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_kernel_of_every_density(density: float, dtype: torch.dtype) -> None:
    dense, held = weight(33, 140, dtype, density)
    x = torch.randn(3, 140, dtype=dtype, device=DEVICE)
    assert_close(launch(x, *held, None, 33, tile=SMALL), x.double() @ dense.double().T, terms=140)


@pytest.mark.parametrize(
    ("dtype", "splits"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.bfloat16, 5), (torch.float32, 5)], ids=str
)
def test_kernel_with_bias_splits_and_operands_between_nan(dtype: torch.dtype, splits: int) -> None:
    dense, held = weight(33, 577, dtype)
    x = torch.full((3, 700), float("nan"), dtype=dtype, device=DEVICE)[:, 60:637]
    x.copy_(torch.randn(3, 577))
    bias = torch.randn(33, dtype=dtype, device=DEVICE)
    # Behind the eight values that units are filled up with nothing is read.
    values = torch.full((len(held[0]) + 64,), float("nan"), dtype=dtype, device=DEVICE)[32:-32]
    values.copy_(held[0])
    y = launch(x, values, *held[1:], bias, 33, tile=SMALL, splits=splits)
    assert_close(y, x.double() @ dense.double().T + bias.double(), terms=578)


def test_zeros_are_not_multiples_of_what_stands_behind_them() -> None:
    """A lane loads more values than are its own: infinities among them change nothing else."""
    dense = torch.zeros(2, 16)
    dense[0, :4:2], dense[0, 4:], dense[1] = 3.0, float("inf"), float("inf")
    dense = dense.to(torch.bfloat16)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, :4] = 1
    found = write_out(*(tensor.to(DEVICE) for tensor in to_lanes(dense)), 2, 16)
    assert torch.equal(found.cpu(), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (33, 63), (70, 300)])
def test_a_weight_written_out(m: int, n: int, dtype: torch.dtype) -> None:
    dense, held = weight(m, n, dtype)
    assert torch.equal(write_out(*held, m, n), dense)


def test_values_of_another_dtype_are_refused() -> None:
    _, held = weight(16, 16, torch.float16)
    with pytest.raises(ValueError, match=r"they are torch.float16 and x is torch.bfloat16; alike is needed"):
        launch(torch.ones(1, 16, dtype=torch.bfloat16, device=DEVICE), *held, None, 16)


@pytest.mark.parametrize("few", [0, 2, 64])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operation(tokens: tuple[int, ...], few: int, dtype: torch.dtype) -> None:
    dense, held = weight(33, 63, dtype)
    x = torch.randn(*tokens, 63, dtype=dtype, device=DEVICE)
    bias = torch.randn(33, dtype=dtype, device=DEVICE)
    y = unstructured_matmul(x, *held, bias, 33, few)
    assert y.shape == (*tokens, 33)
    assert_close(y, x.double() @ dense.double().T + bias.double(), terms=64)


def test_operation_for_compilers_and_its_gradients() -> None:
    dense, held = weight(8, 16, torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: unstructured_matmul(x, *held, bias, 8, 64), (x, bias))
    out = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    (to_x,) = torch.autograd.grad(unstructured_matmul(x, *held, bias, 8, 64), x, out)
    assert_close(to_x, out @ dense, terms=8)
    torch.library.opcheck(unstructured_matmul, (x, *held, bias, 8, 64))
