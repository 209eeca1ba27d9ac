"""2:4 products by libraries: which takes what, its layout, and what is asked of it (of the real one, where there is a GPU)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from recast.kernels.sparse_matmul import library
from recast.kernels.sparse_matmul.lanes import to_lanes
from recast.kernels.sparse_matmul.sparse24_op import sparse24_matmul
from tests.helpers import assert_close


def weight(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A 2:4 matrix."""
    keep = torch.rand(m, n // 4, 4).argsort(-1) < 2
    return (torch.randn(m, n // 4, 4) * keep).reshape(m, n).to(dtype)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "way"),
    [
        ((7, 5), True, None),
        ((8, 0), True, "cusparselt"),
        ((8, 0), False, "cutlass"),
        ((8, 9), False, "cutlass"),
        ((9, 0), True, "cusparselt"),
        ((9, 0), False, None),
        ((10, 0), True, "cusparselt"),
        ((12, 0), False, None),
    ],
)
def test_which_library(capability: tuple[int, int], cusparselt: bool, way: str | None) -> None:
    assert library.way_for(capability, cusparselt) == way


@pytest.mark.parametrize(
    ("rows", "features", "dtype", "way", "reason"),
    [
        (32, 64, torch.float16, "cutlass", None),
        (16, 16, torch.bfloat16, "cusparselt", None),
        (16, 64, torch.float16, "cutlass", "16 x 64: multiples of 32 x 64 are needed"),
        (32, 96, torch.float16, "cutlass", "32 x 96: multiples of 32 x 64 are needed"),
        (60, 64, torch.float16, "cusparselt", "60 x 64: multiples of 16 x 16 are needed"),
        (0, 64, torch.float16, "cusparselt", "0 x 64: multiples of 16 x 16 are needed"),
        (32, 64, torch.float32, "cusparselt", "values in float32: 16-bit floats are needed"),
        (32, 64, torch.float16, None, "no library here multiplies 2:4 weights"),
    ],
)
def test_what_is_refused(rows: int, features: int, dtype: torch.dtype, way: str | None, reason: str | None) -> None:
    assert library.refused(rows, features, dtype, way) == reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layout_of_cutlass_is_undone_and_small(dtype: torch.dtype) -> None:
    dense = weight(64, 192, dtype)
    values, meta = library._laid_out(dense, "cutlass")
    assert meta is not None
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense)
    assert values.nbytes + meta.nbytes == dense.nbytes * 9 // 16


def test_layout_of_cusparselt_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense + 1)
    dense = weight(16, 16)
    values, meta = library._laid_out(dense, "cusparselt")
    assert torch.equal(values, dense + 1)
    assert meta is None


@pytest.mark.parametrize("way", ["cutlass", "cusparselt"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 8, 13])
def test_what_libraries_are_asked(way: str, biased: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors come in eights and as columns of whole rows, as libraries want them; stand-ins for these multiply."""
    dense = weight(32, 64, torch.float16)

    def product(columns: Tensor, bias: Tensor | None) -> Tensor:
        assert columns.shape == (64, -(-tokens // 8) * 8)
        assert columns.T.is_contiguous()
        y = dense.double() @ columns.double()
        return (y if bias is None else y + bias.double()[:, None]).half()

    def by_cusparselt(packed: Tensor, columns: Tensor, *, bias: Tensor | None, transpose_result: bool) -> Tensor:
        assert transpose_result
        assert bias is None or bias.dtype == torch.float16
        return product(columns, bias).T

    def by_cutlass(values: Tensor, meta: Tensor, columns: Tensor) -> Tensor:
        return product(columns, None)

    def with_bias(bias: Tensor, values: Tensor, meta: Tensor, columns: Tensor) -> Tensor:
        assert bias.dtype == torch.float16
        return product(columns, bias)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", by_cusparselt)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", by_cutlass)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", with_bias)
    x = torch.full((tokens, 96), float("nan"), dtype=torch.float16)[:, 16:80]
    x.copy_(torch.randn(tokens, 64))
    bias = torch.randn(32) if biased else None
    y = library.multiply(x, dense, dense if way == "cutlass" else None, bias)
    assert y.shape == (tokens, 32)
    assert y.is_contiguous()
    assert_close(y, x.double() @ dense.double().T + (0 if bias is None else bias.double()), terms=33)


def test_a_second_layout_changes_nothing_but_the_way() -> None:
    dense = weight(32, 64, torch.float16)
    values = dense.reshape(32, 16, 4)
    places = (values != 0).to(torch.int64).topk(2, dim=-1).indices.sort(-1).values
    words, marks = to_lanes(values.gather(2, places).reshape(32, -1), places.reshape(32, -1))
    packed, meta = library._laid_out(dense, "cutlass")
    x = torch.randn(3, 64, dtype=torch.float16, requires_grad=True)
    bias = torch.randn(32, dtype=torch.float16, requires_grad=True)
    operands = (x, words, marks, bias, packed, meta, 64)
    assert_close(sparse24_matmul(*operands), x.double() @ dense.double().T + bias.double(), terms=33)
    to_x, to_bias = torch.autograd.grad(sparse24_matmul(*operands).sum(), (x, bias))
    assert_close(to_x, dense.double().sum(0).expand(3, -1), terms=32)
    assert_close(to_bias, torch.full((32,), 3.0, dtype=torch.float64), terms=3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sparse24_matmul, operands, test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 63, 577])
def test_the_library_of_this_gpu(tokens: int, dtype: torch.dtype) -> None:
    dense = weight(96, 192, dtype).cuda()
    found = library.packed(dense)
    if isinstance(found, str):
        pytest.skip(found)
    x, bias = torch.randn(tokens, 192, dtype=dtype, device="cuda"), torch.randn(96, dtype=dtype, device="cuda")
    y = library.multiply(x, *found, bias)
    assert_close(y, x.double() @ dense.double().T + bias.double(), terms=97)
