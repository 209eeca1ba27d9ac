"""Sparse weights from the plan to a file and on every target."""

from __future__ import annotations

import itertools
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
        {"match": "6", "form": "armor(block=8, iterations=3) | int4(group=8)"},
        {"match": "8", "form": "column_sparse(0.5) + unstructured(0.3)"},
        {"match": "10", "form": "unstructured(0.1, storage='tiled')"},
        {"match": "12", "form": "unstructured(0.2, storage='tiled') | int4(group=8)"},
        {"match": "14", "form": "quantease_outliers(0.05)"},
    ],
    "allow_larger": True,
}


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    # Sizes that do not divide by the groups.
    sizes = [63, 60, 77, 16, 30, 21, 70, 130, 33]
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
    model = nn.Sequential(*layers[:-1]).eval()
    captured = recast.capture(model, (torch.randn(4, 5, 63),))
    plan = recast.plan(captured, RECIPE)
    return recast.rewrite(captured, plan, cache=OperatorCache(None), pictures=False, measure=False)


@pytest.mark.parametrize("target", ["eager", "onnx"])
def test_saved_and_loaded(program: recast.Program, target: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    artifact = recast.lower(program, target)
    artifact.save(tmp_path / "saved")
    again = recast.load(tmp_path / "saved")
    with torch.no_grad():
        for tokens in (5, 1, 17):
            x = torch.randn(3, tokens, 63)
            expected = program(x)
            assert_close(artifact(x), expected, terms=16 * 130)
            assert_close(again(x), expected, terms=16 * 130)


def test_compiled(program: recast.Program) -> None:
    artifact = recast.lower(program, "inductor")
    kernels = [row.kernel for row in artifact.report.rows]
    assert kernels[:3] == ["aten (sparse, written out)"] * 3
    with torch.no_grad():
        for tokens in (5, 17):
            x = torch.randn(3, tokens, 63)
            assert_close(artifact(x), program(x), terms=16 * 130)
