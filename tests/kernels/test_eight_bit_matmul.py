"""Products of eight-bit numbers on both sides against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.eight_bit_matmul.launch import launch
from recast.kernels.tiles import TILES, Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(33, 63), (64, 60), (130, 577)]  # rows, inputs
TILE_LIST = list(dict.fromkeys(tile for tiles in TILES.values() for _, tile in tiles))


def numbers(*size: int, kind: str) -> Tensor:
    """Random numbers of a format, its largest among them."""
    if kind == "int8":
        return torch.randint(-128, 128, size, dtype=torch.int8, device=DEVICE)
    found = (torch.randn(size, device=DEVICE) * 100).clamp(-448, 448)
    return found.to(torch.float8_e4m3fn)


def meant(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.double() @ weight.double().T * scale.double()


def close(found: Tensor, codes: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Integers are added up exactly but for the last step, a conversion; floats as float32 adds them up."""
    wanted = meant(codes, weight, scale)
    if codes.dtype == torch.int8:
        assert_close(found / 2**14, wanted / 2**14, terms=1)
        return
    size = (codes.double().abs() @ weight.double().abs().T * scale.double()).clamp_min(1e-30)
    assert_close((found / size).to(found.dtype), wanted / size, terms=codes.shape[1])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tile", TILE_LIST, ids=lambda tile: f"{tile.rows}x{tile.tokens}")
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tile(kind: str, tile: Tile, splits: int) -> None:
    torch.manual_seed(0)
    for rows, features in SHAPES:
        weight, scale = numbers(rows, features, kind=kind), torch.rand(rows, device=DEVICE) + 0.5
        for tokens in (1, tile.tokens + 1):
            codes = numbers(tokens, features, kind=kind)
            close(launch(codes, weight, scale, tile=tile, splits=splits), codes, weight, scale)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [(0,), (5,), (2, 3)])
def test_operation(kind: str, tokens: tuple[int, ...]) -> None:
    weight, scale = numbers(33, 63, kind=kind), torch.rand(33, device=DEVICE)
    codes = numbers(*tokens, 63, kind=kind)
    y = eight_bit_matmul(codes, weight, scale)
    assert (y.shape, y.dtype) == ((*tokens, 33), torch.float32)
    close(y.reshape(-1, 33), codes.reshape(-1, 63), weight, scale)
    # The check of schemas adds to operands, which torch cannot do with such floats.
    asked = ("test_schema", "test_faketensor") if kind == "int8" else ("test_faketensor",)
    torch.library.opcheck(eight_bit_matmul, (codes, weight, scale), test_utils=asked)


def test_the_largest_sums_are_exact() -> None:
    codes, weight = torch.full((3, 577), -128, dtype=torch.int8), torch.full((20, 577), -128, dtype=torch.int8)
    y = eight_bit_matmul(codes.to(DEVICE), weight.to(DEVICE), torch.ones(20, device=DEVICE))
    assert torch.equal(y.cpu(), torch.full((3, 20), 577.0 * 2**14))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_operands_that_lie_apart(kind: str) -> None:
    room = numbers(9, 126, kind=kind)
    weight, scale = numbers(33, 63, kind=kind), torch.rand(33, device=DEVICE)
    codes = room[1:8:2, ::2]
    close(launch(codes, weight, scale), codes.contiguous(), weight, scale)
    wide = numbers(66, 63, kind=kind)[::2]
    close(launch(codes, wide, scale), codes.contiguous(), wide.contiguous(), scale)
