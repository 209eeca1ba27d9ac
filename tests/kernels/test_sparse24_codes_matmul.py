"""2:4 weights of codes: layout, the operation, and the Triton kernel (interpreted where there is no GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.quantized_matmul.launch import pairs_of
from recast.kernels.sparse24_codes_matmul.codes_op import sparse24_codes_matmul
from recast.kernels.sparse24_codes_matmul.lanes import block_of, from_lanes, to_lanes
from recast.kernels.sparse24_codes_matmul.launch import launch, steps_of, tile_of
from recast.kernels.tiles import TILES, Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def codes(m: int, n: int, bits: int, zero: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of all inputs (m, n), n a multiple of 4, and the lane order of the two that are kept of four."""
    places = torch.rand(m, n // 4, 4).argsort(-1)[..., :2].sort(-1).values
    kept = torch.randint(0, 2**bits, (m, n // 4, 2))
    dense = torch.full((m, n // 4, 4), zero).scatter(2, places, kept).reshape(m, n)
    words, marks = to_lanes(kept.reshape(m, -1), places.reshape(m, -1), bits, zero)
    return dense.to(DEVICE), words.to(DEVICE), marks.to(DEVICE)


def integers(m: int, n: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight of integers (m, n) in float64, its lane order and scales."""
    dense, words, marks = codes(m, n, bits, 2 ** (bits - 1))
    scale = torch.rand(-(-n // (group or n)), m, device=DEVICE) + 0.5
    of = torch.arange(n, device=DEVICE) // (group or n)
    return (dense - 2 ** (bits - 1)) * scale.T[:, of].double(), words, marks, scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("features", [4, 60, 256, 580])
def test_lane_order_is_undone_and_small(features: int, bits: int) -> None:
    dense, words, marks = codes(5, features, bits, 3)
    assert torch.equal(from_lanes(words, marks, bits, 3, features), dense.to(torch.uint8))
    blocks = -(-features // block_of(bits))
    assert (words.nbytes + marks.nbytes) * 8 == 5 * blocks * block_of(bits) * (bits // 2 + 1)


def test_other_bits_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 3 bits have none; 4 or 8 would work"):
        block_of(3)
    with pytest.raises(ValueError, match="groups of 24 inputs do not divide so; 64 would"):
        steps_of(4, 24)


@pytest.mark.parametrize("tile", [SMALL, *(tile for _, tile in TILES["cuda"][:-1]), tile_of(128, 16, "cuda")], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 0), (8, 0)])
def test_kernel_of_every_tile(tile: Tile, bits: int, group: int) -> None:
    weight, words, marks, scale = integers(77, 300, bits, group)
    x = torch.randn(33, 300, dtype=torch.bfloat16, device=DEVICE)
    found = launch(x, words, marks, scale, None, None, bits=bits, group=group, kind="integer", tile=tile)
    assert_close(found, x.double() @ weight.T, terms=150)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_kernel_with_bias_splits_and_rows_far_apart(splits: int, dtype: torch.dtype) -> None:
    weight, words, marks, scale = integers(33, 580, 4, 64)
    x = torch.full((3, 700), float("nan"), dtype=dtype, device=DEVICE)[:, 60:640]
    x.copy_(torch.randn(3, 580))
    around = torch.full((33, 128), -1, dtype=torch.int32, device=DEVICE)
    around[:, 32 : 32 + words.shape[1]] = words
    words = around[:, 32 : 32 + words.shape[1]]
    bias = torch.randn(33, device=DEVICE).to(dtype)
    found = launch(x, words, marks, scale, None, bias, bits=4, group=64, kind="integer", tile=SMALL, splits=splits)
    assert_close(found, x.double() @ weight.T + bias.double(), terms=580)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3)], ids=str)
def test_tables(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    table = torch.cat((torch.zeros(1), torch.randn(15))).to(torch.bfloat16).to(DEVICE)
    dense, words, marks = codes(33, 60, 4, 0)
    x = torch.randn(*tokens, 60, device=DEVICE).to(dtype)
    y = sparse24_codes_matmul(x, words, marks, None, table, pairs_of(table), None, 4, 0)
    assert y.shape == (*tokens, 33)
    assert_close(y, x.double() @ table.double()[dense].T, terms=30)


def test_operation_for_compilers_and_its_gradients() -> None:
    weight, words, marks, scale = integers(8, 64, 4, 16)
    x = torch.randn(3, 64, dtype=torch.float16, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float16, device=DEVICE, requires_grad=True)
    out = torch.randn(3, 8, dtype=torch.float16, device=DEVICE)
    operands = (x, words, marks, scale, None, None, bias, 4, 16)
    to_x, to_bias = torch.autograd.grad(sparse24_codes_matmul(*operands), (x, bias), out)
    assert_close(to_x, out.double() @ weight, terms=8)
    assert_close(to_bias, out.double().sum(0), terms=3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sparse24_codes_matmul, operands, test_utils=checks)
