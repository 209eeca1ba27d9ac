"""Between a kernel and the library by the number of tokens: what is measured, and that operations keep to it."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from recast.kernels.armor_matmul.armor_op import armor_matmul
from recast.kernels.block_diagonal_matmul.block_op import block_matmul
from recast.kernels.eight_bit_matmul import library, reference
from recast.kernels.eight_bit_matmul.eight_bit_op import eight_bit_matmul
from recast.kernels.low_rank_matmul.low_rank_op import low_rank_matmul
from recast.kernels.sparse24_codes_matmul import lanes as code_lanes
from recast.kernels.sparse24_codes_matmul.codes_op import sparse24_codes_matmul
from recast.kernels.sparse_matmul import lanes
from recast.lowering.triton.few import ALWAYS, measured_few, search
from tests.helpers import assert_close

pytest.importorskip("triton")

N, M, TOKENS = 32, 32, 6


def low_rank(few: int) -> tuple[Callable[[Tensor], Tensor], str]:
    left, right = torch.randn(M, 5), torch.randn(5, N)
    return lambda x: low_rank_matmul(x, left, right, None, few), "low_rank_matmul.low_rank_op"


def armor(few: int) -> tuple[Callable[[Tensor], Tensor], str]:
    places = torch.tensor([0, 2]).repeat(M, N // 4)
    words, marks = lanes.to_lanes(torch.randn(M, N // 2).to(torch.bfloat16), places)
    left, right = torch.randn(M // 16, 16, 16), torch.randn(N // 16, 16, 16)
    return lambda x: armor_matmul(x.bfloat16(), words, marks, left, right, None, few), "armor_matmul.armor_op"


def blocks(few: int) -> tuple[Callable[[Tensor], Tensor], str]:
    held = torch.randn(2, M // 2, N // 2)
    return lambda x: block_matmul(x, held, None, None, None, [], [], few), "block_diagonal_matmul.block_op"


def codes24(few: int) -> tuple[Callable[[Tensor], Tensor], str]:
    places = torch.tensor([1, 3]).repeat(M, N // 4)
    words, marks = code_lanes.to_lanes(torch.randint(0, 16, (M, N // 2)), places, 4, 8)
    scale = torch.rand(1, M)
    return (
        lambda x: sparse24_codes_matmul(x, words, marks, scale, None, None, None, 4, 0, few),
        "sparse24_codes_matmul.codes_op",
    )


def bytes_(few: int) -> tuple[Callable[[Tensor], Tensor], str]:
    weight, scale = torch.randint(-128, 128, (M, N), dtype=torch.int8), torch.rand(M)
    return lambda x: eight_bit_matmul(x.to(torch.int8), weight, scale, few), "eight_bit_matmul.eight_bit_op"


@pytest.mark.parametrize("made", [low_rank, armor, blocks, codes24, bytes_], ids=lambda made: made.__name__.strip("_"))
def test_more_tokens_than_few_go_to_the_library(
    made: Callable[[int], tuple[Callable[[Tensor], Tensor], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fewer to the kernel; both give the same."""
    found, used = [], []
    tokens = 20  # the library takes no fewer than 17 vectors of integers
    for few in (ALWAYS, tokens, tokens - 1, 0):
        torch.manual_seed(0)
        run, where = made(few)
        module = importlib.import_module(f"recast.kernels.{where}")
        monkeypatch.setattr(module, "interpreting", lambda: True)
        called: list[int] = []
        monkeypatch.setattr(module, "launch", noting(called, module, run))
        found.append(run(torch.randn(tokens, N) * 3))
        used.append(bool(called))
        monkeypatch.undo()
    assert used == [True, True, False, False]
    for other in found[1:]:
        assert_close(other, found[0], terms=8 * N)


def noting(called: list[int], module: Any, run: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """What stands for a launch where there is no GPU: a note, and the operation's own other way."""

    def launch(x: Tensor, *operands: Any, **settings: Any) -> Tensor:
        called.append(len(x))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "interpreting", lambda: False)
            return run(x)

    return launch


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_the_library_multiplies_eight_bits(dtype: torch.dtype) -> None:
    codes, weight = (torch.randint(-100, 100, (rows, 48)).to(dtype) for rows in (33, 64))
    scale = torch.rand(64)
    assert library.serves(codes, weight)
    assert_close(
        library.eight_bit_matmul(codes, weight, scale), reference.eight_bit_matmul(codes, weight, scale), terms=48
    )


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(33, 60, 64), (33, 64, 63), (16, 64, 64)])
def test_what_the_library_does_not_take_stays_with_the_kernel(tokens: int, inputs: int, outputs: int) -> None:
    codes, weight = torch.ones(tokens, inputs, dtype=torch.int8), torch.ones(outputs, inputs, dtype=torch.int8)
    assert not library.serves(codes, weight)
    assert torch.equal(
        eight_bit_matmul(codes, weight, torch.ones(outputs), 0), torch.full((tokens, outputs), float(inputs))
    )


@pytest.mark.parametrize(("wins_up_to", "expected"), [(0, 0), (16, 16), (10**9, ALWAYS)])
def test_the_number_is_where_the_library_begins_to_win(
    wins_up_to: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def medians(runs: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int) -> list[float]:
        return [float(run()) for run in runs]

    def multiply(x: Tensor, few: int) -> Tensor:
        assert x.shape[1] == N
        assert few in (ALWAYS, 0)
        return torch.tensor(2.0 if few == ALWAYS and len(x) > wins_up_to else 1.0 if few == ALWAYS else 1.5)

    monkeypatch.setattr("recast.lowering.timing.medians", medians)
    assert search(multiply, N, torch.bfloat16, torch.device("cpu"), "test", wins_up_to) == expected


def test_without_a_gpu_nothing_is_timed() -> None:
    def never(x: Tensor, few: int) -> Tensor:
        raise AssertionError("timed")

    assert measured_few(never, N, torch.bfloat16, torch.device("cpu"), "test") is None
