"""Block products: the operation, its gradients, and the Triton kernel (interpreted where there is no GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from recast.kernels.block_diagonal_matmul import launch as launching
from recast.kernels.block_diagonal_matmul.block_op import block_matmul
from recast.kernels.block_diagonal_matmul.launch import DTYPES, TILES
from recast.kernels.tiles import Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)
# Number of blocks, outputs and inputs of each: ragged in both, long, single, of one output, of a few.
SHAPES = [(3, 21, 35), (2, 48, 300), (1, 33, 64), (5, 1, 16), (7, 9, 4)]


def places(count: int, index: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Where each feature of the blocks stands, from the definition."""
    if index is not None:
        return index.long()
    f = torch.arange(count, device=DEVICE)
    if not grid:
        return f
    rows, columns, width = grid
    row, column, within = f // (columns * width), f // width % columns, f % width
    return (column * rows + row) * width + within


def expected(
    x: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    in_grid: Sequence[int] = (),
    out_grid: Sequence[int] = (),
) -> Tensor:
    """Write the whole matrix out in float64."""
    b, p, q = blocks.shape
    whole = torch.zeros(b * p, b * q, dtype=torch.float64, device=x.device)
    dense = torch.block_diag(*blocks.double())  # type: ignore[no-untyped-call]
    whole[places(b * p, scatter, out_grid)[:, None], places(b * q, gather, in_grid)] = dense
    y = x.double() @ whole.T
    return y if bias is None else y + bias.double()


def launch(x: Tensor, blocks: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    """Run the kernel for all the outputs of the blocks."""
    b, p, _ = blocks.shape
    return launching.launch(x, blocks, bias, b * p, inputs=x.shape[1] // b, **rest)


def drawn(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, p, q = shape
    blocks = torch.randn(shape, dtype=dtype, device=DEVICE)
    x = torch.randn(tokens, b * q, dtype=dtype, device=DEVICE)
    return x, blocks, torch.randn(b * p, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"])], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_of_every_tile(tile: Tile, dtype: torch.dtype) -> None:
    for tokens in (1, 9, 33):
        x, blocks, bias = drawn((3, 21, 35), tokens, dtype)
        assert_close(launch(x, blocks, bias, tile=tile), expected(x, blocks, bias), terms=36)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_kernel_with_tails_and_splits(shape: tuple[int, int, int], splits: int) -> None:
    x, blocks, bias = drawn(shape, 5, torch.bfloat16)
    y = launch(x, blocks, bias, tile=SMALL, splits=splits)
    assert_close(y, expected(x, blocks, bias), terms=shape[2] + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_with_operands_between_nan(dtype: torch.dtype) -> None:
    def within(tensor: Tensor) -> Tensor:
        """The same numbers as part of a tensor that is NaN elsewhere."""
        around = torch.full([size + 7 for size in tensor.shape], float("nan"), dtype=dtype, device=DEVICE)
        inner = around[tuple(slice(3, 3 + size) for size in tensor.shape)]
        inner.copy_(tensor)
        return inner

    x, blocks, bias = drawn((3, 21, 35), 5, dtype)
    y = launch(within(x), within(blocks), within(bias), splits=1)
    assert_close(y, expected(x, blocks, bias), terms=36)
    # Vectors that are not contiguous, and blocks turned over.
    turned = blocks.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(launch(x.T.contiguous().T, turned, bias), expected(x, blocks, bias), terms=36)


@pytest.mark.parametrize("inner", ["as they are", "grid", "cells", "index"])
@pytest.mark.parametrize("outer", ["as they are", "grid", "cells", "index"])
def test_kernel_with_features_in_another_order(inner: str, outer: str) -> None:
    x, blocks, bias = drawn((4, 48, 32), 5, torch.float32)
    orders = {"gather": 128, "scatter": 192}
    given: dict[str, Tensor | None] = {}
    grids: dict[str, Sequence[int]] = {}
    for (name, count), kind in zip(orders.items(), (inner, outer), strict=True):
        given[name] = torch.randperm(count, dtype=torch.int32, device=DEVICE) if kind == "index" else None
        # Cells of sixteen are what a thread loads at once.
        grids["in_grid" if name == "gather" else "out_grid"] = {
            "grid": (4, count // 8, 2),
            "cells": (count // 64, 4, 16),
        }.get(kind, ())
    y = launch(x, blocks, bias, **given, **grids, tile=SMALL)
    assert_close(y, expected(x, blocks, bias, **given, **grids), terms=33)


def test_columns_of_zeros_are_padding() -> None:
    x, blocks, bias = drawn((3, 21, 35), 5, torch.bfloat16)
    padded = torch.nn.functional.pad(blocks, (0, 13))
    assert torch.equal(launch(x, padded, bias), launch(x, blocks, bias))
    with pytest.raises(ValueError, match="x has 105 features, 3 blocks of 64 take 192"):
        block_matmul(x, torch.nn.functional.pad(blocks, (0, 29)), bias, None, None, [], [])


def test_sums_in_another_order_and_a_last_block_cut_off() -> None:
    _, blocks, bias = drawn((3, 21, 35), 5, torch.float32)
    sums = torch.randn(4, 5, 100, device=DEVICE)
    order = torch.randperm(100, dtype=torch.int32, device=DEVICE)
    y = launching.launch(sums, blocks, bias[:60], 60, gather=order, tile=SMALL)
    padded = torch.nn.functional.pad(sums.sum(0)[:, order.long()], (0, 5))
    assert_close(y, expected(padded, blocks, bias)[:, :60], terms=40)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_operation(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    _, blocks, bias = drawn((3, 11, 20), 1, dtype)
    x = torch.randn(*tokens, 60, dtype=dtype, device=DEVICE)
    order = torch.randperm(60, dtype=torch.int32, device=DEVICE)
    y = block_matmul(x, blocks, bias, order, None, [], [3, 11, 1])
    assert y.shape == (*tokens, 33)
    wanted = expected(x.reshape(-1, 60), blocks, bias, order, None, (), (3, 11, 1))
    assert_close(y, wanted.reshape(y.shape), terms=21)


@pytest.mark.parametrize("order", ["as they are", "grid", "index"])
@pytest.mark.parametrize("padding", [0, 12])
def test_gradients(order: str, padding: int) -> None:
    x, blocks, bias = drawn((3, 11, 20), 6, torch.float32)
    gather, scatter = (torch.randperm(n, dtype=torch.int32, device=DEVICE) for n in (60, 33))
    rest = {
        "as they are": (None, None, [], []),
        "grid": (None, None, [3, 5, 4], [3, 11, 1]),
        "index": (gather, scatter, [], []),
    }[order]
    held = torch.nn.functional.pad(blocks, (0, padding))
    leaves = [t.requires_grad_() for t in (x, held, bias)]
    weights = torch.randn(6, 33, device=DEVICE)
    found = torch.autograd.grad(block_matmul(*leaves, *rest), leaves, weights)
    wide = [t.detach().double().requires_grad_() for t in (x, blocks, bias)]
    wanted = torch.autograd.grad(expected(*wide, *rest), wide, weights.double())
    for ours, right in zip(
        found, (wanted[0], torch.nn.functional.pad(wanted[1], (0, padding)), wanted[2]), strict=True
    ):
        assert_close(ours, right, terms=20)


def test_gradients_in_float64_and_of_gradients() -> None:
    x, blocks, bias = (t.requires_grad_() for t in drawn((2, 3, 2), 3, torch.float64))
    order = torch.randperm(4, dtype=torch.int32, device=DEVICE)

    def run(x: Tensor, blocks: Tensor, bias: Tensor) -> Tensor:
        return block_matmul(x, blocks, bias, order, None, [], [2, 3, 1])

    assert torch.autograd.gradcheck(run, (x, blocks, bias))
    assert torch.autograd.gradgradcheck(run, (x, blocks, bias))


def test_operation_for_compilers() -> None:
    x, blocks, bias = (t.requires_grad_() for t in drawn((3, 11, 20), 4, torch.float16))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(block_matmul, (x, blocks, bias, None, None, [], [3, 11, 1]), test_utils=checks)
