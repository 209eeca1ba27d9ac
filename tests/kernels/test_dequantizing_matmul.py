"""Packed codes times activations: layout, the operation, and the Triton kernel (interpreted where there is no GPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recast.kernels.quantized_matmul.dequantizing_op import dequantizing_matmul, written_out
from recast.kernels.quantized_matmul.lanes import block_of, from_lanes, to_lanes
from recast.kernels.quantized_matmul.launch import launch, pairs_of, steps_of, write_out
from recast.kernels.tiles import Tile
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(16, 16, 1)


def weights(m: int, n: int, bits: int, group: int, *, zeros: bool, kind: str = "integer") -> dict[str, Tensor | None]:
    """Random codes in lane order with scales, as the kernel takes them."""
    groups = -(-n // group) if group else 1
    words, high_words = to_lanes(torch.randint(0, 2**bits, (m, n)), bits)
    zero = torch.randint(0, 2**bits, (groups, m)) - (128 if bits == 8 else 0)
    found = {
        "values": words,
        "high_values": high_words,
        "scale": torch.rand(groups, m) + 0.5,
        "zero": zero.to(torch.bfloat16) if zeros else None,
        "table": torch.randn(2**bits) if kind == "table" else None,
    }
    if kind == "float":  # every number of the format but its two NaNs
        codes = torch.randint(0, 256, (m, n))
        found["values"], _ = to_lanes(torch.where(codes % 128 == 127, 0, codes), 8)
    return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in found.items()}


def meant(x: Tensor, held: dict[str, Tensor | None], bits: int, group: int, kind: str) -> Tensor:
    """The product in float64."""
    wide = {name: None if t is None or t.dtype == torch.int32 else t.double() for name, t in held.items()}
    wide |= {name: held[name] for name in ("values", "high_values")}
    return (
        x.double() @ written_out(**wide, bits=bits, group=group, kind=kind, features=x.shape[1], dtype=torch.float64).T
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("features", [1, 63, 64, 577])
def test_lane_order_is_undone_and_padded_with_zero(bits: int, features: int) -> None:
    codes = torch.randint(0, 2**bits, (5, features), dtype=torch.uint8)
    words, high_words = to_lanes(codes, bits)
    assert torch.equal(from_lanes(words, high_words, bits, features), codes)
    whole = -(-features // block_of(bits)) * block_of(bits)
    assert not from_lanes(words, high_words, bits, whole)[:, features:].any()
    held = words.numel() * 4 + (0 if high_words is None else high_words.numel() * 4)
    assert held == 5 * whole * bits // 8  # as small as the number of bits says


def test_lane_order_by_its_definition() -> None:
    codes = torch.randint(0, 16, (1, 256))
    words, _ = to_lanes(codes, 4)
    for k in range(256):
        block, p, lane, half = k // 128, k % 128 // 8, k % 8 // 2, k % 2
        word = int(words[0, 16 * block + 4 * lane + p // 4])
        assert (word >> (16 * half + 4 * (p % 4))) & 15 == int(codes[0, k])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernel_of_integers(bits: int, zeros: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 300, dtype=dtype, device=DEVICE)
    held = weights(30, 300, bits, 64, zeros=zeros)
    y = launch(x, **held, bias=None, left=None, inner=None, bits=bits, group=64, kind="integer", tile=SMALL)
    assert y.dtype == dtype
    assert_close(y, meant(x, held, bits, 64, "integer"), terms=300)


@pytest.mark.parametrize("group", [0, 16, 32, 48, 128, 512])
def test_kernel_of_every_group(group: int) -> None:
    x = torch.randn(5, 300, dtype=torch.bfloat16, device=DEVICE)
    held = weights(17, 300, 4, group, zeros=True)
    y = launch(x, **held, bias=None, left=None, inner=None, bits=4, group=group, kind="integer", tile=SMALL)
    assert_close(y, meant(x, held, 4, group, "integer"), terms=300)


@pytest.mark.parametrize(("bits", "kind"), [(2, "table"), (3, "table"), (4, "table"), (8, "table"), (8, "float")])
def test_kernel_of_tables_and_small_floats(bits: int, kind: str) -> None:
    x = torch.randn(4, 130, dtype=torch.float16, device=DEVICE)
    held = weights(33, 130, bits, 32, zeros=False, kind=kind)
    y = launch(x, **held, bias=None, left=None, inner=None, bits=bits, group=32, kind=kind, tile=SMALL)
    assert_close(y, meant(x, held, bits, 32, kind), terms=130)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_of_tables_in_pairs(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 130, dtype=dtype, device=DEVICE)
    held = weights(33, 130, bits, 32, zeros=False, kind="table")
    table = held["table"]
    assert table is not None
    rounded = table.to(dtype)
    given = held | {"table": pairs_of(rounded)}
    y = launch(x, **given, bias=None, left=None, inner=None, bits=bits, group=32, kind="pairs", tile=SMALL)
    assert_close(y, meant(x, held | {"table": rounded}, bits, 32, "table"), terms=130)


@pytest.mark.parametrize("tile", [Tile(32, 16, 2), Tile(64, 32, 4), Tile(64, 64, 4), Tile(128, 128, 8, 3)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_kernel_of_every_tile(tile: Tile, tokens: int) -> None:
    x = torch.randn(tokens, 200, dtype=torch.bfloat16, device=DEVICE)
    held = weights(77, 200, 4, 0, zeros=False)
    y = launch(x, **held, bias=None, left=None, inner=None, bits=4, group=0, kind="integer", tile=tile)
    assert_close(y, meant(x, held, 4, 0, "integer"), terms=200)


@pytest.mark.parametrize(("splits", "rank"), [(1, 1), (2, 16), (3, 40), (7, 40)])
def test_kernel_with_bias_low_rank_term_and_splits(splits: int, rank: int) -> None:
    m, n, tokens = 30, 577, 5
    x = torch.randn(tokens, n, dtype=torch.bfloat16, device=DEVICE)
    held = weights(m, n, 4, 32, zeros=True)
    bias = torch.randn(m, dtype=torch.bfloat16, device=DEVICE)
    left = torch.randn(m, rank, dtype=torch.bfloat16, device=DEVICE)
    inner = torch.randn(tokens, rank, dtype=torch.bfloat16, device=DEVICE)
    y = launch(
        x, **held, bias=bias, left=left, inner=inner, bits=4, group=32, kind="integer", tile=SMALL, splits=splits
    )
    expected = meant(x, held, 4, 32, "integer") + inner.double() @ left.double().T + bias.double()
    assert_close(y, expected, terms=n + rank + 1)


def test_kernel_reads_nothing_beside_its_operands() -> None:
    """Rows lie far apart in memory that is not finite, as do the places that the kernel fills."""
    x = torch.full((3, 700), float("nan"), device=DEVICE, dtype=torch.float16)[:, 30:331]
    x.copy_(torch.randn(3, 301))
    held = weights(20, 301, 3, 16, zeros=True)
    around = torch.full((20, 4096), -1, dtype=torch.int32, device=DEVICE)
    words = held["values"]
    assert words is not None
    around[:, 64 : 64 + words.shape[1]] = words
    held["values"] = around[:, 64 : 64 + words.shape[1]]
    y = launch(x, **held, bias=None, left=None, inner=None, bits=3, group=16, kind="integer", tile=SMALL, splits=2)
    assert_close(y, meant(x, held | {"values": words}, 3, 16, "integer"), terms=301)


def test_addresses_beyond_32_bits(tmp_path: Path) -> None:
    held = weights(3, 128, 4, 0, zeros=False)
    words, stride = held["values"], 2**30 + 16
    assert words is not None
    # Pages of the file that are never written take no space.
    size = 2 * stride + words.shape[1]
    flat = (
        torch.empty(size, dtype=torch.int32, device=DEVICE)
        if DEVICE == "cuda"
        else torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.int32)
    )
    far = flat.as_strided(tuple(words.shape), (stride, 1))
    far.copy_(words)
    x = torch.randn(2, 128, dtype=torch.bfloat16, device=DEVICE)
    y = launch(
        x, **(held | {"values": far}), bias=None, left=None, inner=None, bits=4, group=0, kind="integer", tile=SMALL
    )
    assert_close(y, meant(x, held, 4, 0, "integer"), terms=128)


def test_groups_that_are_no_sixteens_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 60"):
        steps_of(4, 60)


WRITTEN = [
    (bits, kind, dtype)
    for bits in (2, 3, 4, 8)
    for kind in ("integer", "zeros", "table", "pairs", "float")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if (kind != "float" or bits == 8) and (kind != "pairs" or (bits < 8 and dtype != torch.float32))
]


@pytest.mark.parametrize(("bits", "kind", "dtype"), WRITTEN, ids=str)
def test_a_weight_written_out(bits: int, kind: str, dtype: torch.dtype) -> None:
    for m, n, group in ((1, 16, 0), (33, 63, 32), (70, 300, 128), (5, 577, 0)):
        zeros = kind == "zeros"
        form = {"zeros": "integer", "pairs": "table"}.get(kind, kind)
        held = weights(m, n, bits, group, zeros=zeros, kind=form)
        if held["table"] is not None:
            held["table"] = held["table"].to(dtype)
        wanted = meant(torch.eye(n, device=DEVICE), held, bits, group, form).T
        operands = list(held.values())
        if kind == "pairs":
            assert held["table"] is not None
            operands[-1] = pairs_of(held["table"])
        said = "pairs" if kind == "pairs" else form
        found = write_out(*operands, bits=bits, group=group, kind=said, features=n, dtype=dtype)
        assert_close(found, wanted, terms=2)


@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operation(tokens: tuple[int, ...], dtype: torch.dtype, few: int) -> None:
    m, n, rank = 33, 63, 4
    x = torch.randn(*tokens, n, dtype=dtype, device=DEVICE)
    held = weights(m, n, 4, 32, zeros=True)
    left, right = torch.randn(m, rank, dtype=dtype, device=DEVICE), torch.randn(rank, n, dtype=dtype, device=DEVICE)
    bias = torch.randn(m, dtype=dtype, device=DEVICE)
    y = dequantizing_matmul(x, *held.values(), None, bias, left, right, 4, 32, "integer", few)
    assert y.shape == (*tokens, m)
    flat = x.reshape(-1, n)
    expected = meant(flat, held, 4, 32, "integer") + flat.double() @ right.double().T @ left.double().T + bias.double()
    assert_close(y.reshape(-1, m), expected, terms=n * rank)


def test_operation_for_compilers_and_its_gradients() -> None:
    held = weights(8, 32, 4, 16, zeros=True)
    sizes = {"x": (3, 32), "bias": (8,), "left": (8, 2), "right": (2, 32)}
    operands = {name: torch.randn(size, dtype=torch.float64, requires_grad=True) for name, size in sizes.items()}
    fixed = [None if t is None else t.cpu() for t in held.values()]

    def run(x: Tensor, bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return dequantizing_matmul(x, *fixed, None, bias, left, right, 4, 16, "integer", 0)

    assert torch.autograd.gradcheck(run, tuple(operands.values()))
    x, bias, left, right = operands.values()
    torch.library.opcheck(dequantizing_matmul, (x, *fixed, None, bias, left, right, 4, 16, "integer", 0))
