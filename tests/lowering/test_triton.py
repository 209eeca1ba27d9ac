"""The triton target, its kernels interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import recast
from recast.lowering.triton.serving.armor import ARMOR
from recast.lowering.triton.serving.blocks import BLOCKS
from recast.lowering.triton.serving.dequantizing import DEQUANTIZING, WITH_LOW_RANK
from recast.lowering.triton.serving.eight_bit import FLOATS, INTEGERS
from recast.lowering.triton.serving.gated import GATED
from recast.lowering.triton.serving.low_rank import LOW_RANK
from recast.lowering.triton.serving.sparse24 import SPARSE24
from recast.lowering.triton.serving.sparse24_codes import SPARSE24_CODES
from recast.passes.report import fidelity
from recast.patterns.errors import TargetError
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {
    "int4(group=16)": f"{DEQUANTIZING} + bias",
    "int3(group=32, symmetric=false)": f"{DEQUANTIZING} + bias",
    "int8": f"{DEQUANTIZING} + bias",
    "nf4(group=16)": f"{DEQUANTIZING} + bias",
    "nf4(double=true)": f"{DEQUANTIZING} + bias",
    "int4(group=16) + low_rank(rank=3)": f"{WITH_LOW_RANK} + bias",
    "low_rank(rank=20) | int4(group=16)": f"{DEQUANTIZING} + bias",
    "low_rank(rank=20)": f"{LOW_RANK} + bias",
    "wina(0.5)": f"{GATED} + bias",
    "teal(0.3)": f"{GATED} + bias",
    "fp8": f"{DEQUANTIZING} + bias",
    "int4(group=20)": "aten (groups of 20 are no multiple of 16)",
    "int8(activations=true)": f"{INTEGERS} + bias",
    "int8(activations=true, per_token=false)": f"{INTEGERS} + bias",
    "fp8(activations=true)": f"{FLOATS} + bias",
    "fp8(group=16, activations=true)": DEQUANTIZING,
}


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(60, 48), nn.ReLU(), nn.Linear(48, 33, bias=False)).eval().to(DEVICE)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE),))
    recipe = {"rules": [{"match": "0", "form": "int4(group=16)"}, {"match": "2", "form": "int8(activations=true)"}]}
    artifact = recast.lower(recast.rewrite(program, recast.plan(program, recipe)), "triton")
    kernels = {row.name: row.kernel for row in artifact.report.rows}
    assert kernels == {"0": f"{DEQUANTIZING} + bias + relu", "2": INTEGERS}
    artifact.save(tmp_path / "saved")
    x = torch.randn(5, 60, device=DEVICE)
    assert torch.equal(recast.load(tmp_path / "saved")(x), artifact(x))


@pytest.mark.parametrize("form", [form for form in FORMS if "activations" in form])
def test_numbers_of_rounded_inputs(form: str) -> None:
    model = nn.Linear(60, 33).eval().to(DEVICE)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))
    artifact = recast.lower(rewritten, "triton")
    assert [row.kernel for row in artifact.report.rows] == [FORMS[form]]
    for tokens in (1, 7):
        x = torch.randn(tokens, 60, device=DEVICE)
        # A rounding tie may fall either way: one step of one activation, a 255th of its range or an eighth of itself.
        assert fidelity(rewritten(x), artifact(x))["relative_error"] < (1e-3 if "int8" in form else 5e-3)


@pytest.mark.parametrize("form", [form for form in FORMS if "activations" not in form])
def test_numbers(form: str) -> None:
    model = nn.Linear(60, 33).eval().to(DEVICE)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))
    artifact = recast.lower(rewritten, "triton")
    assert [row.kernel for row in artifact.report.rows] == [FORMS[form]]
    for tokens in (1, 7):
        x = torch.randn(tokens, 60, device=DEVICE)
        assert_close(artifact(x), rewritten(x), terms=60)


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("sparse24(method='magnitude')", f"{SPARSE24} + bias"),
        ("armor(block=16, iterations=4)", f"{ARMOR} + bias"),
        ("int4(group=16)", f"{DEQUANTIZING} + bias"),
        ("nf4(group=16)", f"{DEQUANTIZING} + bias"),
        ("sparse_nm(1, 4)", "aten (1 of every 4 of 60 inputs: no kernel)"),
        ("sparse24(method='magnitude') | int4(group=8)", f"{SPARSE24_CODES} + bias"),
        ("sparse24(method='magnitude') | int8", f"{SPARSE24_CODES} + bias"),
        ("sparse24(method='magnitude') | nf4(group=16)", f"{SPARSE24_CODES} + bias"),
        ("sparse24(method='magnitude') | int3(group=16)", "aten (2:4: values of 3 bits: no kernel)"),
        ("sparse24(method='magnitude') | int4(group=12)", "aten (2:4: groups of 12 values are no multiple of 8)"),
        (
            "sparse24(method='magnitude') | int4(group=16, symmetric=false)",
            "aten (2:4: values with zero points: no kernel)",
        ),
        ("sparse24(method='magnitude') | fp8", "aten (2:4: values from a table of 256: no kernel)"),
        ("armor(block=16, iterations=4) | int4(group=8)", f"{BLOCKS} + {SPARSE24_CODES}"),
    ],
)
def test_numbers_in_16_bits(form: str, kernel: str) -> None:
    model = nn.Linear(60, 33).eval().to(DEVICE, torch.bfloat16)
    program = recast.capture(model, (torch.randn(4, 60, device=DEVICE, dtype=torch.bfloat16),))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": form, "allow_larger": True}))
    artifact = recast.lower(rewritten, "triton")
    assert [row.kernel for row in artifact.report.rows] == [kernel]
    for tokens in (1, 7):
        x = torch.randn(tokens, 60, device=DEVICE, dtype=torch.bfloat16)
        assert_close(artifact(x), rewritten(x), terms=60)


def test_without_a_gpu_it_says_what_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    program = recast.capture(nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match="no GPU here; target 'inductor'"):
        recast.lower(program, "triton")
