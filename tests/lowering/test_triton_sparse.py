"""Values at any places and 2:4 on the triton target: what serves them, from how many tokens on, and with what beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.kernels.sparse_matmul import library
from recast.lowering import timing
from recast.lowering.triton.serving import sparse24, unstructured
from recast.lowering.triton.serving.sparse24 import SPARSE24, SPARSE24_LIBRARY
from recast.lowering.triton.serving.unstructured import UNSTRUCTURED
from recast.passes.forms import Form
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("unstructured(0.5)", f"{UNSTRUCTURED} + bias"),
        ("unstructured(0.1, storage='tiled')", f"{UNSTRUCTURED} + bias"),
        ("column_sparse(0.5)", "aten"),
        ("column_sparse(0.5) + unstructured(0.3)", f"aten + {UNSTRUCTURED}"),
        ("unstructured(0.5) | int8", "aten (packed values at any places: no kernel)"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_numbers(form: str, kernel: str, dtype: torch.dtype) -> None:
    model = nn.Linear(60, 33).eval().to(DEVICE, dtype)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE, dtype=dtype),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))
    artifact = recast.lower(rewritten, "triton")
    assert [row.kernel for row in artifact.report.rows] == [kernel]
    with torch.no_grad():
        for tokens in (1, 7, 70):
            x = torch.randn(tokens, 60, device=DEVICE, dtype=dtype)
            assert_close(artifact(x), rewritten(x), terms=60)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Linear(63, 33).eval().to(DEVICE)
    program = recast.capture(model, (torch.randn(4, 63, device=DEVICE),))
    plan = recast.plan(program, {"default": "unstructured(0.4)", "allow_larger": True})
    artifact = recast.lower(recast.rewrite(program, plan), "triton", keep_copies=False)
    artifact.save(tmp_path / "saved")
    x = torch.randn(5, 63, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(recast.load(tmp_path / "saved")(x), artifact(x))


def test_values_in_float64_are_left_to_aten() -> None:
    packed = unstructured.serve(Form.parse("unstructured(0.5)").fit(torch.randn(33, 60, dtype=torch.float64)))
    assert packed is not None
    assert packed.kernel == "aten (values at any places in float64: no kernel)"


def fitted() -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """A 2:4 weight and its layout of CUTLASS."""
    dense = Form.parse("sparse24(method='magnitude')").fit(torch.randn(32, 64, dtype=torch.float16)).to_dense()
    return dense, library._laid_out(dense, "cutlass")


@pytest.mark.parametrize(
    ("measured", "few", "kernel"),
    [(0, 32, SPARSE24_LIBRARY), (256, 256, SPARSE24_LIBRARY), (4096, 0, SPARSE24)],
)
@pytest.mark.parametrize("copies", [True, False])
def test_the_second_layout_is_held_where_it_is_faster(
    measured: int, few: int, kernel: str, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def faked(ways: object, device: torch.device, *about: object, among: tuple[int, ...]) -> int:
        asked.append(among)
        return measured

    given: list[int] = []
    multiply = sparse24.sparse24_matmul

    def watched(*operands: object) -> Tensor:
        given.append(int(operands[-1]))
        y: Tensor = multiply(*operands)
        return y

    monkeypatch.setattr(library, "packed", lambda dense: library._laid_out(dense, "cutlass"))
    monkeypatch.setattr(sparse24, "most_tokens", faked)
    monkeypatch.setattr(sparse24, "sparse24_matmul", watched)
    operator = Form.parse("sparse24(method='magnitude')").fit(torch.randn(32, 64, dtype=torch.float16))
    packed = sparse24.serve(operator, copies=copies)
    assert packed is not None
    x = torch.randn(3, 64, dtype=torch.float16)
    assert_close(packed.apply(x), x.double() @ operator.to_dense().double().T, terms=32)
    if not copies:
        assert (packed.kernel, sorted(packed.held), given, asked) == (SPARSE24, ["places", "values"], [0], [])
        return
    assert asked == [(64, 128, 256, 512, 1024, 2048, 4096)]
    assert (packed.kernel, given) == (kernel, [few])
    assert ("packed" in packed.held, "meta" in packed.held) == (kernel == SPARSE24_LIBRARY,) * 2


def test_what_a_library_refuses_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "packed", lambda dense: "60 x 64: multiples of 16 x 16 are needed")
    packed = sparse24.serve(Form.parse("sparse24(method='magnitude')").fit(torch.randn(60, 64, dtype=torch.float16)))
    assert packed is not None
    assert (packed.kernel, sorted(packed.held)) == (SPARSE24, ["places", "values"])


def test_both_ways_that_are_timed_give_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks apart the measurement is the real one: each way is called, and the slower one decides."""
    seen: list[Tensor] = []

    def medians(runs: list[object], device: torch.device, *, rounds: int) -> list[float]:
        seen.extend(run() for run in runs)
        return [1.0, 2.0] if len(seen) < 4 else [2.0, 1.0]

    monkeypatch.setenv("RECAST_CACHE", "off")
    monkeypatch.setattr(timing, "medians", medians)
    monkeypatch.setattr(sparse24, "_AMONG", (2, 3))
    monkeypatch.setattr(timing, "_known", {})
    dense, (values, meta) = fitted()
    packed = sparse24.serve(Form.parse("sparse24(method='magnitude')").fit(dense), copies=False)
    assert packed is not None
    found = sparse24.few_of(packed.held["values"], packed.held["places"], values, meta, torch.float16, 64)
    assert found == 2
    assert [y.shape[0] for y in seen] == [2, 2, 3, 3]
    assert_close(seen[0], seen[1].double(), terms=64)
