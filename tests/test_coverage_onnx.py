"""The ONNX part of the coverage benchmark: how rows are made, judged, counted and put on the page."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    # `benchmarks` is not installed, and the root of the checkout is not on the path.
    monkeypatch.syspath_prepend(str(ROOT))


def _work(name: str, tell: Any) -> Row:
    tell({"name": name, "stage": "begun"})
    if name == "ends":
        os._exit(3)
    if name == "raises":
        raise ValueError("no such thing")
    while name == "hangs":
        pass
    if name == "grows":
        torch.zeros(2**32)
    return {"name": name, "stage": "done"}


def test_a_row_that_goes_wrong_costs_one_row_and_keeps_what_it_told() -> None:
    from benchmarks.coverage_work import run_rows

    names = ["fine", "ends", "raises", "hangs", "grows"]
    rows = {row["name"]: row for row in run_rows(names, _work, jobs=2, limit=1.0, gigabytes=8.0)}
    assert rows["fine"] == {"name": "fine", "stage": "done"}
    assert {rows[name]["stage"] for name in names[1:]} == {"begun"}
    assert rows["ends"]["failed"] == "the process ended by itself, exit status 3"
    assert rows["raises"]["failed"] == "ValueError: no such thing"
    assert rows["hangs"]["failed"] == "not done after 1 seconds"
    assert "memory" in rows["grows"]["failed"]


def test_rows_are_kept_until_they_are_made_anew(tmp_path: Path) -> None:
    from benchmarks.coverage_work import kept_rows, parts_folder, write_json

    file = tmp_path / "figures.json"
    parts = parts_folder(file, resume=False)
    assert parts is not None
    write_json(parts / "bert.json", {"name": "bert"})
    assert kept_rows(parts_folder(file, resume=True), ["bert", "t5"]) == {"bert": {"name": "bert"}}
    assert kept_rows(parts_folder(file, resume=False), ["bert", "t5"]) == {}


def test_a_stage_ends_when_its_share_is_spent() -> None:
    from benchmarks.coverage_onnx_row import Late, at_most

    def count() -> None:
        while True:
            try:
                time.perf_counter()
            except Exception:  # noqa: BLE001  # as libraries do that try one way after another
                continue

    with pytest.raises(Late, match="counting: not done after"), at_most(0.05, "counting"):
        count()


ONE = torch.tensor([2.0, -4.0, 1.0])


@pytest.mark.parametrize(
    ("got", "told"),
    [
        ([ONE, ONE], "2 results instead of 1"),
        ([ONE[None]], r"of shape \(1, 3\) instead of"),
        ([ONE.double()], "result 0 is torch.float64"),
        ([torch.tensor([2.0, float("nan"), 1.0])], "not finite elsewhere"),
    ],
)
def test_another_structure_is_no_small_difference(got: list[Any], told: str) -> None:
    from benchmarks.coverage_onnx_row import difference

    off, text = difference(got, [ONE])
    assert off == float("inf")
    assert re.search(told, text)


def test_differences_are_relative_to_the_largest_value() -> None:
    from benchmarks.coverage_onnx_row import difference, judged

    off, text = difference([ONE + torch.tensor([0.0, 0.0, 0.5])], [ONE])
    assert off == 0.125
    assert text == "result 0 differs by 0.12 of its largest value"
    assert difference([ONE], [ONE]) == (0.0, "")
    infinite = torch.tensor([float("-inf"), 1.0])
    assert difference([infinite], [infinite]) == (0.0, "")
    assert difference([-infinite], [infinite])[0] == float("inf")
    assert difference([torch.tensor([3])], [torch.tensor([4])])[0] == float("inf")
    assert judged([(0.0, ""), (0.25, "far")], 0.1) == {"difference": 0.25, "matches": False, "differs": "far"}
    assert judged([(0.05, "near")], 0.1) == {"difference": 0.05, "matches": True}


def _rows() -> list[Row]:
    fine = {"matches": True, "difference": 0.0, "bytes": 9}
    about = {"captured": True, "sizes": "free", "shapes": [[[2, 3]], [[3, 5]]], "seconds": {"torch": 2.0}}
    return [
        {"name": "a", "torch": {"exported": True, "matches": True}, "dense": fine, "int8": fine} | about,
        {"name": "b", "torch": {"exported": True, "matches": True}, "dense": {"refused": "no 'f' in 3"}} | about
        | {"int8": {"refused": "no 'f' in 3"}},
        {"name": "c", "torch": {"exported": False, "error": "E: no 'f' in 4"}, "dense": fine} | about
        | {"int8": fine | {"checker": "broken"}},
        {"name": "d", "torch": {"exported": True, "matches": True}, "captured": False, "capture_error": "why",
         "failed": "not done after 60 seconds"},
        {"name": "e", "unseen": "not run"},
        {"name": "f", "unbuilt": "too large"},
    ]  # fmt: skip


def test_counts() -> None:
    from benchmarks.coverage_onnx_table import totals, trouble

    whole = totals(_rows())
    assert (whole["run"], whole["not run"], whole["not built"], whole["torch exports"]) == (4, 1, 1, 3)
    assert whole["dense"] == {
        "exports": 2,
        "stands": 2,
        "exports, of those that torch exports": 1,
        "stands, of those that torch exports": 1,
        "stands, and torch does not export": 1,
        "on two shapes": 2,
    }
    assert (whole["int8"]["exports"], whole["int8"]["stands"]) == (2, 1)
    assert [trouble(row, "int8") for row in _rows()[:4]] == [
        "", "no 'f' in 3", "onnx's checker: broken", "not captured: why"
    ]  # fmt: skip


def test_reasons_that_differ_in_names_and_numbers_are_one() -> None:
    from benchmarks.coverage_onnx_table import alike

    assert alike("no 'f' in 3: BertForMaskedLM") == alike("no 'gg' in 42: T5Model")
    assert alike("no 'f' in 3") != alike("one 'f' in 3")


def test_the_page_holds_both_parts_whichever_is_written(tmp_path: Path) -> None:
    from benchmarks.coverage_onnx_table import section, totals
    from benchmarks.coverage_table import join

    file = tmp_path / "page.md"
    file.write_text("# First\n\ntext\n")
    for _ in range(2):
        join(file, section(_rows(), totals(_rows()), {"torch": "2"}))
    text = file.read_text()
    assert text.startswith("# First\n\ntext\n\n## ONNX\n")
    assert text.count("## ONNX") == 1
    assert "| stand, of those that torch exports | 3 | 1 | 1 |" in text
    assert "- 1: no 'f' in 3: b" in text
    assert "### Not run\n\n- 1: not run: e" in text


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_one_architecture_from_end_to_end() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from benchmarks.coverage_onnx_row import examine

    row = examine("distilbert", lambda row: None, "example")
    assert row["torch"]["matches"]
    assert row["dense"]["matches"]
    assert row["int8"]["matches"]
    assert not {"checker", "inference", "refused"} & (set(row["dense"]) | set(row["int8"]))
    assert row["int8"]["bytes"] < row["dense"]["bytes"]
