"""The inductor target against the eager one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.kernels.eight_bit_matmul import rounded_rows
from recast.kernels.quantized_matmul.ops import int8_matmul, largest_exact_code
from recast.lowering.inductor.weight_only import PACKED, ROUNDED
from recast.passes.report import fidelity
from recast.patterns.errors import TargetError
from tests.helpers import assert_close


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(63, 60), nn.GELU(), nn.Linear(60, 77), nn.ReLU(), nn.Linear(77, 16)).eval()
    return recast.capture(model, (torch.randn(4, 5, 63),))


RECIPE = {
    "rules": [
        {"match": "0", "form": "int8(activations=true, reduce_range=true)"},
        {"match": "2", "form": "low_rank(ratio=0.6) | int8"},
        {"match": "4", "form": "int4(group=16) + low_rank(rank=2)"},
    ],
    "allow_larger": True,
}


@pytest.mark.parametrize("own", [True, False], ids=["own", "library"])
def test_compiled_equals_eager_and_loads_bit_identical(
    program: recast.Program, tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own:
        monkeypatch.setattr("recast.lowering.inductor.rounded.rounded_rows.unavailable", lambda: "not asked for")
    vnni = rounded_rows.unavailable() is None
    rewritten = recast.rewrite(program, recast.plan(program, RECIPE))
    eager = recast.lower(rewritten, "eager")
    artifact = recast.lower(rewritten, "inductor")
    assert [row.kernel for row in artifact.report.rows] == [
        "recast int8 product (VNNI) + bias + gelu" if vnni else "onednn int8",
        PACKED,
        "aten (unpacked once) + aten",  # groups of 16: blocks hold 32 inputs
    ]
    with torch.no_grad():
        for tokens in (5, 1, 17):
            x = torch.randn(3, tokens, 63)
            # A rounding tie may fall either way: one step of one activation is 1/255 of its range.
            assert fidelity(eager(x), artifact(x))["relative_error"] < 1e-3
    artifact.save(tmp_path / "saved")
    again = recast.load(tmp_path / "saved")
    x = torch.randn(3, 5, 63)
    torch._dynamo.reset()
    assert torch.equal(recast.lower(rewritten, "inductor")(x), again(x))


class Beside(nn.Module):
    """Several linears of the same x."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(96, 33, bias=i % 2 == 0) for i in range(count)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.each]


KEPT_PACKED = [
    "int8", "int4(group=32)", "int4(group=32, symmetric=false)", "int3", "int2(group=64)", "nf4(group=32)",
    "nf4(group=32, double=true)", "fp8", "fp4(group=32)", "kmeans(bits=4)", "int4(group=32) + low_rank(rank=3)",
]  # fmt: skip


@pytest.mark.parametrize("keep_dense", [False, True])
def test_weights_stay_packed(keep_dense: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    program = recast.capture(Beside(len(KEPT_PACKED)).eval(), (torch.randn(4, 5, 96),))
    rules = [{"match": f"each.{i}", "form": text} for i, text in enumerate(KEPT_PACKED)]
    rewritten = recast.rewrite(program, recast.plan(program, {"rules": rules, "allow_larger": True}))
    eager = recast.lower(rewritten, "eager")
    artifact = recast.lower(rewritten, "inductor", keep_dense=keep_dense)
    assert {row.kernel for row in artifact.report.rows} == {PACKED, f"{PACKED} + aten"}
    for tokens in (1, 2, 300):  # decoded in registers, and written out
        x = torch.randn(1, tokens, 96)
        for found, wanted in zip(artifact(x), eager(x), strict=True):
            assert_close(found, wanted.double(), terms=96)
    artifact.save(tmp_path / "saved")
    assert recast.load(tmp_path / "saved").report.rows == artifact.report.rows


def test_few_tokens_are_rounded_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recast.lowering.inductor.weight_only.most_tokens", lambda *about, **among: 8)
    torch.manual_seed(1)
    texts = ["int8", "int4(group=32, symmetric=false)", "nf4(group=32)"]
    program = recast.capture(Beside(len(texts)).eval(), (torch.randn(4, 5, 96),))
    rules = [{"match": f"each.{i}", "form": text} for i, text in enumerate(texts)]
    rewritten = recast.rewrite(program, recast.plan(program, {"rules": rules}))
    eager = recast.lower(rewritten, "eager")
    artifact = recast.lower(rewritten, "inductor", accuracy_level=4)
    assert [row.kernel for row in artifact.report.rows] == [ROUNDED, ROUNDED, PACKED]
    x = torch.randn(1, 2, 96)
    errors = [fidelity(wanted, found)["relative_error"] for found, wanted in zip(artifact(x), eager(x), strict=True)]
    assert all(1e-4 < error < 2e-2 for error in errors[:2]), errors
    assert errors[2] < 1e-5
    x = torch.randn(1, 9, 96)  # more than are rounded
    assert all(fidelity(b, a)["relative_error"] < 1e-5 for a, b in zip(artifact(x), eager(x), strict=True))
    artifact.save(tmp_path / "saved")
    loaded = recast.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), artifact(x), strict=True))
    with pytest.raises(TargetError, match=r"accuracy_level is 2; 0 \(exact\) or 4"):
        recast.lower(rewritten, "inductor", accuracy_level=2)


@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 7, 3), (5, 63, 60), (33, 577, 64), (0, 8, 8)])
def test_integer_product_is_exact_within_the_range_that_is_said_to_be(tokens: int, n: int, m: int) -> None:
    top = min(127, largest_exact_code())
    codes = torch.randint(-128, 128, (tokens, n), dtype=torch.int8)
    weight = torch.randint(-top, top + 1, (m, n), dtype=torch.int8)
    if tokens:
        codes[0], weight[0] = 127, top  # the largest sum there is
    found = int8_matmul(codes, weight, torch.ones(m))
    assert torch.equal(found.double(), codes.double() @ weight.double().T)


def test_packed_weights_follow_their_storage() -> None:
    codes = torch.randint(-128, 128, (4, 16), dtype=torch.int8)
    weight = torch.randint(-64, 65, (8, 16), dtype=torch.int8)
    int8_matmul(codes, weight, torch.ones(8))
    weight.neg_()
    assert torch.equal(int8_matmul(codes, weight, torch.ones(8)).double(), codes.double() @ weight.double().T)
    torch.library.opcheck(int8_matmul, (codes, weight, torch.ones(8)))


def test_codes_that_would_saturate_are_not_given_to_the_integer_product(
    program: recast.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recast.lowering.inductor.kernels.largest_exact_code", lambda: 64)
    rewritten = recast.rewrite(program, recast.plan(program, "int8(activations=true)"))
    kernels = {row.kernel for row in recast.lower(rewritten, "inductor").report.rows}
    assert kernels == {"aten, rounded in float: this CPU's int8 product would saturate"}
    x = torch.randn(3, 4, 63)
    with torch.no_grad():
        assert_close(recast.lower(rewritten, "eager")(x), rewritten(x), terms=1)


def test_many_programs_in_one_process_are_no_recompilations_of_each_other() -> None:
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    for width in range(2, limit + 4):
        model = torch.nn.Linear(width, 3).eval()
        x = torch.randn(4, width)
        artifact = recast.lower(recast.capture(model, (x,)), "inductor")
        assert_close(artifact(x), model(x), terms=width)
