"""An artifact that computes something else than the eager program is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.lowering.agreement import agree
from recast.lowering.artifact import Artifact
from recast.patterns.errors import VerificationError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(63, 60), nn.GELU(), nn.Linear(60, 17)).eval()


@pytest.mark.parametrize("recipe", ["dense", "int8", "low_rank(ratio=0.5)"])
@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_every_target_is_checked(target: str, recipe: str) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    artifact = recast.optimize(
        model(), (torch.randn(5, 63),), recipe=recipe, target=target, batches=[torch.randn(70, 63)]
    )
    (figures,) = artifact.report.agreement.values()
    whole = artifact.report.whole.get("output 0", {"relative_error": 0.0})["relative_error"]
    assert figures["relative_error"] <= 2 * whole + 1e-5
    assert f"{target} and the eager rewritten program differ by" in str(artifact.report)
    assert artifact.report.to_dict()["agreement"]["output 0"] == figures


def broken(change: Any) -> Artifact:
    artifact = recast.lower(recast.capture(model(), (torch.randn(5, 63),)), target="eager")
    runner = artifact.runner

    def wrong(leaves: list[Any]) -> list[Any]:
        return [change(value) for value in runner(leaves)]

    artifact.runner = wrong  # type: ignore[assignment]
    return artifact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.001, r"target 'eager': output 0 differs from the eager program by 0.001 \(relative\)"),
        (lambda y: y * float("nan"), "differs from the eager program by nan"),
        (lambda y: y[:, :3], r"output 0 has shape \(5, 3\), the eager program gives \(5, 17\)"),
    ],
)
def test_what_differs_is_refused(change: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        agree(broken(change))


def test_what_is_written_says_so(tmp_path: Path) -> None:
    artifact = recast.optimize(model(), (torch.randn(5, 63),), recipe="int8", target="eager")
    artifact.save(tmp_path / "a")
    assert recast.load(tmp_path / "a").report.agreement == artifact.report.agreement != {}
    assert "eager against eager" in (tmp_path / "a" / "report.html").read_text()


def test_without_verification_nothing_is_run() -> None:
    artifact = recast.optimize(model(), (torch.randn(5, 63),), recipe="int8", target="eager", verification=False)
    assert artifact.report.agreement == {}


def test_infinite_values_stand_where_they_stood() -> None:
    def pole(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, float("-inf"))

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pole(x)

    artifact = recast.lower(recast.capture(Masked().eval(), (torch.randn(4, 3),)), target="eager")
    assert agree(artifact).agreement["output 0"]["relative_error"] == 0
