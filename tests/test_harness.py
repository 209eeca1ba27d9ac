"""The benchmark harness: who is timed, what is said of those who are not, and that no folder of a machine gets out."""

import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def harness() -> Any:
    # `benchmarks` is not installed, and the root of the checkout is not on the path.
    spec = importlib.util.spec_from_file_location("_harness", ROOT / "benchmarks" / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_harness"] = module
    spec.loader.exec_module(module)
    return module


def contestant(harness: Any, name: str, seconds: float, **more: Any) -> Any:
    return harness.Contestant(name, lambda: harness.Ready(lambda _: time.sleep(seconds), 1000), **more)


def broken() -> Any:
    raise RuntimeError("no kernel in /home/somebody/secret/model.onnx for this\nand more")


@pytest.fixture(scope="module")
def result(harness: Any) -> Any:
    everybody = [
        contestant(harness, "base", 0.002),
        contestant(harness, "hopeless", 0.02),
        contestant(harness, "fast", 0.001, group="recast", against=("base", "hopeless", "nobody")),
        contestant(harness, "slow", 0.005, group="recast", against=("base",)),
        contestant(harness, "elsewhere", 0.001, requires=("a_module_that_does_not_exist",)),
        harness.Contestant("broken", broken),
    ]
    options = {"baseline": "base", "rounds": 5, "warmup": 1, "pause": 0.0}
    return harness.measure("toy", everybody, None, assess=lambda run: {"cosine": 1.0}, **options)


def test_everybody_is_timed_and_the_hopeless_only_at_first(result: Any) -> None:
    assert {row.name: len(row.samples) for row in result.rows} == {
        "base": 5,
        "hopeless": 2,
        "fast": 5,
        "slow": 5,
        "elsewhere": 0,
        "broken": 0,
    }


def test_a_row_is_held_to_the_fastest_peer_that_ran(result: Any) -> None:
    assert result.peer(result.row("fast")).name == "base"
    assert result.verdict(result.row("slow")).startswith("slower than base (")


def test_what_was_not_timed_says_why(result: Any) -> None:
    absent = {row.name: row.absent for row in result.rows if row.absent}
    assert absent["elsewhere"] == "not installed: a_module_that_does_not_exist"
    assert absent["broken"] == "failed: RuntimeError: no kernel in model.onnx for this"


def test_less_faithful_is_said(harness: Any, result: Any) -> None:
    worse = harness.Row("worse", "", "recast", fidelity={"cosine": 0.9}, against=("base",))
    worse.samples = [s / 2 for s in result.row("base").samples]
    assert result.verdict(worse) == "faster than base (0.50x), less faithful (cosine)"


def test_json_and_table(result: Any, tmp_path: Path) -> None:
    result.save(tmp_path / "results" / "toy.json")
    text = (tmp_path / "results" / "toy.json").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in json.loads(text)["rows"]}
    assert rows["base"]["ratio"] == 1
    assert {"bytes", "milliseconds", "fidelity", "target"} <= rows["fast"].keys()
    assert rows["slow"]["peer"] == "base"
    assert "secret" not in text
    assert str(ROOT) not in text
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["toy.json"]
    console = Console(file=io.StringIO(), width=200)
    result.print(console)
    assert "slower than base" in console.file.getvalue()  # type: ignore[attr-defined]
