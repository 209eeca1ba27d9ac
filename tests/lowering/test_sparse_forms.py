"""Sparse weights from the plan to a file and on every target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import recast
from recast.passes.cache import OperatorCache
from tests.helpers import assert_close

RECIPE = {
    "rules": [
        {"match": "0", "form": "sparse24"},
        {"match": "2", "form": "sparse24 | int4(group=8)"},
        {"match": "4", "form": "sparse_nm(5, 8)"},
    ],
    "allow_larger": True,
}


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    # Sizes that do not divide by the groups.
    model = nn.Sequential(nn.Linear(63, 60), nn.GELU(), nn.Linear(60, 77), nn.ReLU(), nn.Linear(77, 16)).eval()
    captured = recast.capture(model, (torch.randn(4, 5, 63),))
    plan = recast.plan(captured, RECIPE)
    return recast.rewrite(captured, plan, cache=OperatorCache(None), pictures=False, measure=False)


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_saved_loaded_and_run(program: recast.Program, target: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    artifact = recast.lower(program, target)
    artifact.save(tmp_path / "saved")
    again = recast.load(tmp_path / "saved")
    with torch.no_grad():
        for tokens in (5, 1, 17):
            x = torch.randn(3, tokens, 63)
            expected = program(x)
            assert_close(artifact(x), expected, terms=16 * 77)
            assert_close(again(x), expected, terms=16 * 77)
