import json
from collections.abc import Callable
from pathlib import Path

import pytest

import recast
from recast import demo
from tests.cli.conftest import Done

Cli = Callable[..., Done]


@pytest.fixture
def small(tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo on a tiny model, with few sentences."""
    monkeypatch.setattr(demo, "model_directory", lambda: tiny)
    for name, value in (("TOKENS", 8), ("CALIBRATION", 32), ("EVALUATION", 4)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "RECIPES", {"dense": {}, "int8": "int8", "mixed": demo.RECIPES["mixed"]})
    return here


def test_demo_writes_report_artifacts_and_rows(cli: Cli, small: Path) -> None:
    arguments = ("demo", "--targets", "eager", "--rounds", 1, "--batch-size", 2, "--json")
    done = cli(*arguments)
    assert done.status == 0, done.err
    rows = done.json["rows"]
    assert [(r["name"], r["target"]) for r in rows] == [("dense", "eager"), ("int8", "eager"), ("mixed", "eager")]
    assert rows[0]["fidelity"]["worst_cosine"] > 0.99999
    assert all(r["fidelity"]["worst_cosine"] > 0.9 and r["milliseconds"] > 0 for r in rows)
    assert rows[0]["bytes"] > rows[1]["bytes"] > 0
    assert rows[1]["coverage"] == 1
    out = small / "recast-demo"
    assert "recast demo: MiniLM-L6" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "demo.json").read_text(encoding="utf-8"))["rows"] == rows
    assert recast.load(out / "artifacts" / "int8" / "eager").report.rows
    assert cli(*arguments).status == 0  # a former demo is replaced
    assert sorted(p.name for p in small.iterdir()) == ["little.py", "recast-demo", "x.safetensors"]


def test_demo_leaves_other_folders_alone_and_goes_on_without_a_target(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "mine").mkdir()
    (small / "mine" / "file").write_text("precious", encoding="utf-8")
    assert cli("demo", "--out", "mine").status == 2
    assert cli("demo", "--targets", "eager,nothing").status == 2
    lower = demo.lower

    def lower_or_not(program: recast.Program, target: str) -> recast.Artifact:
        if target == "onnx":
            raise recast.patterns.errors.TargetError("target 'onnx': not installed; pip install 'recast[onnx]'")
        return lower(program, target)

    monkeypatch.setattr(demo, "lower", lower_or_not)
    monkeypatch.setattr(demo, "RECIPES", {"dense": {}})
    done = cli("demo", "--targets", "eager,onnx", "--rounds", 1, "--batch-size", 2)
    assert done.status == 0, done.err
    assert "pip install 'recast[onnx]'" in done.out


def test_sentences_are_prose_and_disjoint() -> None:
    calibration, evaluation = demo.sentences()
    assert len(calibration) > 200
    assert len(evaluation) > 200
    assert not set(calibration) & set(evaluation)
    assert all(8 <= len(s.split()) <= 60 for s in calibration)
