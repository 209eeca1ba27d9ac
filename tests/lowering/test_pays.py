"""Forms that are slower than dense are refused, with figures. No test depends on how fast this machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recast
from recast.lowering import pays, timing
from recast.lowering.pays import Times, time_operator
from recast.passes.forms import Form
from recast.patterns.errors import PlanError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 64)).eval()


RECIPE = {
    "rules": [{"match": "0", "form": "low_rank(4)"}, {"match": "2", "form": "int8"}, {"match": "3", "form": "int8"}]
}


def test_slower_at_all_counts_of_tokens() -> None:
    assert Times({1: 1.0, 128: 1.0}, {1: 1.2, 128: 1.1}).slower
    assert not Times({1: 1.0, 128: 1.0}, {1: 1.2, 128: 0.9}).slower
    assert not Times({1: 1.0}, {1: 1.04}).slower  # two runs of the same code differ by as much
    assert str(Times({1: 1e-3}, {1: 2e-3})) == "2 against 1 ms at 1 tokens"


def test_what_is_slower_stays_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def slow(operator: Any, target: str, tokens: Any) -> Times:
        timed.append(operator.kind)
        worse = operator.kind == "quantized"
        return Times(dict.fromkeys(tokens, 1e-3), dict.fromkeys(tokens, 3e-3 if worse else 5e-4))

    monkeypatch.setattr(pays, "time_operator", slow)
    x = torch.randn(5, 64)
    artifact = recast.optimize(model(), (x,), recipe=RECIPE, target="eager", tokens=(1, 16))
    assert timed == ["product", "quantized", "quantized"]  # shapes differ
    assert [row.name for row in artifact.report.rows] == ["0"]
    reasons = {entry["name"]: entry["reason"] for entry in artifact.report.to_dict()["skipped"]}
    assert reasons["2"] == (
        "int8 is slower than dense on 'eager': 3 against 1 ms at 1 tokens, 3 against 1 ms at 16 tokens; allow_slower overrides"
    )
    assert artifact(x).shape == (5, 64)
    timed.clear()
    every = recast.optimize(model(), (x,), recipe=RECIPE, target="eager", tokens=(1,), allow_slower=True)
    assert len(every.report.rows) == 3
    assert not timed


def test_structures_of_one_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    def fast(operator: Any, target: str, tokens: Any) -> Times:
        timed.append(operator.shape)
        return Times({1: 1.0}, {1: 0.5})

    monkeypatch.setattr(pays, "time_operator", fast)
    alike = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))).eval()
    artifact = recast.optimize(alike, (torch.randn(3, 32),), recipe="int8", target="eager", tokens=(1,))
    assert len(artifact.report.rows) == 5
    assert timed == [(32, 32)]


def test_times_are_kept_by_structure_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path))
    operator = Form.parse("low_rank(4)").fit(torch.randn(48, 64))
    first = time_operator(operator, "eager", (1, 8))
    assert sorted(first.dense) == sorted(first.form) == [1, 8]
    assert all(seconds > 0 for times in (first.dense, first.form) for seconds in times.values())
    monkeypatch.setattr(pays, "medians", lambda runs, x: pytest.fail("timed again"))
    other = Form.parse("low_rank(4)").fit(torch.randn(48, 64))
    assert time_operator(other, "eager", (1, 8)) == first
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        time_operator(operator, "eager", (2,))
    monkeypatch.setattr(timing, "_source", lambda: "other kernels")
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        time_operator(operator, "eager", (1, 8))


def test_no_numbers_of_tokens() -> None:
    with pytest.raises(PlanError, match="names no numbers of vectors"):
        time_operator(Form.parse("int8").fit(torch.randn(8, 8)), "eager", ())
