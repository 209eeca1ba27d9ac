"""Inputs rounded to float formats, on every target: the numbers of the eager program, and through a saved file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.lowering.inductor.weight_only import PACKED
from recast.passes.cache import OperatorCache
from recast.patterns.program import Program
from tests.helpers import assert_close

FORMS = [
    "fp8(activations=true)",
    "fp4(activations=true) + low_rank(4)",
    "low_rank(9) | fp8(activations=true)",
    "fp8(group=16, kind='e5m2', activations=true)",
    "minifloat(3, 2, activations=true)",
    "llm_int8('fp8(activations=true)', 3.0)",
]
IN, OUT = 48, 24


class Many(nn.Module):
    """One linear a form, of the same x: what one rounds otherwise does not reach another."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(IN, OUT, bias=i % 2 == 0) for i in range(count)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.each]


def rewritten(forms: list[str]) -> Program:
    torch.manual_seed(0)
    program = recast.capture(Many(len(forms)).eval(), (torch.randn(4, 5, IN),))
    calibration = recast.calibrate(program, [torch.randn(40, 9, IN)])
    rules = {"rules": [{"match": f"each.{i}", "form": text} for i, text in enumerate(forms)], "allow_larger": True}
    planned = recast.plan(program, rules, calibration)
    return recast.rewrite(program, planned, calibration=calibration, cache=OperatorCache(None), pictures=False)


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_every_target_rounds_to_the_same_numbers(target: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    # Compiling takes its time: rounding, a sum with a product of inputs that are not rounded, and a product of two.
    forms = FORMS[:3] if target == "inductor" else FORMS
    program = rewritten(forms)
    artifact = recast.lower(program, target=target)
    runs = [artifact]
    if target == "inductor":  # which compiles again what it loads
        assert PACKED in {row.kernel for row in artifact.report.rows}
    else:
        artifact.save(tmp_path / "saved")
        runs.append(recast.load(tmp_path / "saved"))
    for batch in ((3, 17), (1, 48)):
        x = torch.randn(*batch, IN) * torch.logspace(-3, 3, batch[1]).unsqueeze(1)
        x[0, 0] = 0
        # Halves, which go to the even number of the format.
        x[-1, -1] = torch.arange(IN) % 25 / 4
        with torch.no_grad():
            expected = program(x)
        for run in runs:
            for i, (found, wanted) in enumerate(zip(run(x), expected, strict=True)):
                if forms[i].startswith("low_rank"):
                    # What the second factor rounds was added up in another order: a number near a half may go either way.
                    assert float((found - wanted).norm()) <= 1e-2 * float(wanted.norm())
                else:
                    assert_close(found, wanted, terms=4 * IN)
