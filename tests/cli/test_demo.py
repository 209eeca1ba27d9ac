import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import recast
from recast import demo
from recast.beside import Beside
from recast.encoder import sentences
from recast.lowering.base import lowering_named
from recast.patterns.errors import TargetError
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

    def missing() -> None:
        raise recast.patterns.errors.TargetError("target 'onnx': not installed; pip install 'recast[onnx]'")

    monkeypatch.setattr(lowering_named("onnx"), "installed", missing)
    monkeypatch.setattr(demo, "RECIPES", {"dense": {}})
    done = cli("demo", "--targets", "eager,onnx", "--rounds", 1, "--batch-size", 2)
    assert done.status == 0, done.err
    assert "pip install 'recast[onnx]'" in done.out


def test_artifacts_made_in_a_second_process_are_those_of_this_one(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("demo", "--targets", "onnx,eager", "--rounds", 1, "--batch-size", 2, "--json")
    assert done.status == 0, done.err
    rows = {(r["name"], r["target"]): r for r in done.json["rows"]}
    assert [target for _, target in rows] == ["onnx"] * 3 + ["eager"] * 3
    for name in ("dense", "int8", "mixed"):
        exported, eager = rows[name, "onnx"], rows[name, "eager"]
        assert exported["fidelity"]["worst_cosine"] == pytest.approx(eager["fidelity"]["worst_cosine"], abs=1e-5)
        assert exported["coverage"] == eager["coverage"]
        assert exported["bytes"] > 0
    kinds = {site.kernel for site in recast.load(small / "recast-demo" / "artifacts" / "int8" / "onnx").report.rows}
    assert kinds
    assert "onnx: " in (small / "recast-demo" / "report.html").read_text(encoding="utf-8")


def test_a_second_process_that_ends_early_is_told_of(tmp_path: Path) -> None:
    program = recast.capture(torch.nn.Linear(8, 4).eval(), (torch.randn(3, 8),))
    with Beside() as beside:
        beside.lower(beside.hand(program), "onnx", tmp_path / "made")
        assert beside.process is not None
        beside.process.kill()
        with pytest.raises(TargetError, match="ended early"):
            beside.wait(tmp_path / "made")
    with Beside() as beside:
        source = beside.hand(program)
        beside.lower(source, "nothing", tmp_path / "made")
        with pytest.raises(TargetError, match="there is no target 'nothing'"):
            beside.wait(tmp_path / "made")
        # What both may do is done once: by whoever claims it first.
        beside.compile(source, "eager", tmp_path / "eager", {"input": torch.randn(3, 8)})
        beside.wait(tmp_path / "eager")
        assert not beside.claim(tmp_path / "eager")
        assert recast.load(tmp_path / "eager").report is not None
    assert [p.name for p in tmp_path.iterdir()] == ["eager"]


def test_sentences_are_prose_and_disjoint() -> None:
    calibration, evaluation = sentences()
    assert len(calibration) > 200
    assert len(evaluation) > 200
    assert not set(calibration) & set(evaluation)
    assert all(8 <= len(s.split()) <= 60 for s in calibration)
