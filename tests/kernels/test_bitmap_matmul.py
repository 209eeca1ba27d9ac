"""Weights with values at the bits set in a bitmap: layout, operation, and Triton kernels (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.bitmap_matmul import launch as launching
from recast.kernels.bitmap_matmul import reference
from recast.kernels.bitmap_matmul.bitmap_op import bitmap_matmul
from recast.kernels.bitmap_matmul.launch import DTYPES, TILES, launch, write_out
from recast.kernels.tiles import Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def drawn(m: int, n: int, dtype: torch.dtype, density: float = 0.5) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A matrix with values at some places, and how it is laid out."""
    mask = torch.rand(m, n, device=DEVICE) < density
    values = torch.randn(int(mask.sum()), device=DEVICE).to(dtype)
    dense = torch.zeros(m, n, dtype=dtype, device=DEVICE)
    dense[mask] = values
    return dense, reference.to_quads(values, mask)


def between_nan(held: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as part of tensors that hold NaN, or marks and places of nothing, around them."""
    values, words, starts = held
    around = torch.full((len(values) + 64,), float("nan"), dtype=values.dtype, device=DEVICE)
    around[32:-32] = values
    wide = torch.full((words.shape[0] + 2, words.shape[1] + 8), -1, dtype=torch.int32, device=DEVICE)
    wide[1:-1, 4:-4] = words
    far = torch.full((starts.shape[0] + 2, starts.shape[1] + 2), 1, dtype=torch.int32, device=DEVICE)
    far[1:-1, 1:-1] = starts
    return around[32:-32], wide[1:-1, 4:-4], far[1:-1, 1:-1]


def expected(x: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ dense.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("shape", [(1, 1), (63, 60), (5, 577), (8, 128), (3, 129), (1031, 9)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_layout(shape: tuple[int, int], density: float) -> None:
    dense, held = drawn(*shape, torch.float64, density)
    values, words, starts = held
    assert torch.equal(reference.from_quads(values, words, *shape), dense)
    assert torch.equal(reference.of_places(dense, words, len(values)), values)
    sizes = (t.numel() * t.element_size() for t in (values[2:], words, starts))
    assert sum(sizes) == reference.held_bytes(*shape, len(values) - 2, values.element_size())
    marks = reference.marks_of(words).sum((-2, -1)).reshape(starts.shape[0], -1, reference.STEP // 8).sum(-1).flatten()
    assert torch.equal(starts.flatten().long(), 1 + marks.cumsum(0) - marks)


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"])], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_of_every_tile(tile: Tile, dtype: torch.dtype) -> None:
    dense, held = drawn(33, 150, dtype)
    x = torch.randn(min(tile.tokens, 16) + 3, 150, device=DEVICE).to(dtype)
    assert_close(launch(x, *held, None, 33, tile=tile, splits=1), expected(x, dense), terms=75)


@pytest.mark.parametrize("shape", [(63, 60), (5, 577)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_tails_splits_bias_and_operands_between_nan(shape: tuple[int, int], splits: int) -> None:
    dense, held = drawn(*shape, torch.bfloat16)
    x = torch.full((3, shape[1] + 40), float("nan"), dtype=torch.bfloat16, device=DEVICE)[:, 20:-20]
    x.copy_(torch.randn(x.shape))
    bias = torch.randn(shape[0], device=DEVICE).bfloat16()
    y = launch(x, *between_nan(held), bias, shape[0], splits=splits)
    assert_close(y, expected(x, dense, bias), terms=shape[1])


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_densities(density: float) -> None:
    dense, held = drawn(20, 70, torch.float16, density)
    x = torch.randn(2, 70, device=DEVICE).half()
    assert_close(launch(x, *held, None, 20), expected(x, dense), terms=70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_out(dtype: torch.dtype) -> None:
    dense, held = drawn(63, 157, dtype)
    assert torch.equal(write_out(*between_nan(held), 63, 157), dense)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (9,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_operation(tokens: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("launch", "write_out"):
        monkeypatch.setattr(f"recast.kernels.bitmap_matmul.bitmap_op.{name}", _noted(ran, name))
    dense, held = drawn(11, 60, dtype)
    x = torch.randn(*tokens, 60, dtype=dtype, device=DEVICE)
    bias = torch.randn(11, dtype=dtype, device=DEVICE)
    y = bitmap_matmul(x, *held, bias, 11, 8)
    assert y.shape == (*tokens, 11)
    assert_close(y, expected(x, dense, bias), terms=60)
    wanted = [] if dtype == torch.float64 else ["write_out"] if tokens == (9,) else ["launch"]
    assert ran == wanted


def _noted(ran: list[str], name: str) -> object:
    run = getattr(launching, name)

    def noted(*operands: object) -> object:
        ran.append(name)
        return run(*operands)

    return noted


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype, tokens: int) -> None:
    dense, (values, words, starts) = drawn(11, 140, dtype)
    x = torch.randn(tokens, 140, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(11, device=DEVICE).to(dtype).requires_grad_()
    operands = (x, values.requires_grad_(), bias)
    out = torch.randn(tokens, 11, device=DEVICE).to(dtype)
    found = torch.autograd.grad(bitmap_matmul(x, values, words, starts, bias, 11, 8), operands, out)
    wide = [t.detach().double().requires_grad_() for t in (x, dense, bias)]
    to_x, to_dense, to_bias = torch.autograd.grad(expected(*wide), wide, out.double())
    assert_close(found[0], to_x, terms=11)
    assert_close(found[1], reference.of_places(to_dense, words, len(values)), terms=tokens)
    assert_close(found[2], to_bias, terms=tokens)


def test_gradients_in_float64() -> None:
    _, (values, words, starts) = drawn(5, 9, torch.float64)
    x, bias = (torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True) for size in ((3, 9), (5,)))
    values.requires_grad_()

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return bitmap_matmul(x, values, words, starts, bias, 5, 0)

    assert torch.autograd.gradcheck(run, (x, values, bias))


def test_operation_for_compilers() -> None:
    _, (values, words, starts) = drawn(11, 60, torch.float16)
    x = torch.randn(3, 60, device=DEVICE).half().requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operands = (x, values.requires_grad_(), words, starts, None, 11, 8)
    torch.library.opcheck(bitmap_matmul, operands, test_utils=checks)
