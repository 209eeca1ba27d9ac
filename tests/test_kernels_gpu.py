"""`benchmarks.kernels_gpu`, which measures kernels on a GPU: its whole path in the interpreter, and what it holds kernels to."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from recast.kernels.timed import BenchCase, cases

ROOT = Path(__file__).resolve().parent.parent
ONLY = "(^|tokens, )(int4 g128|torch _weight_int8pack_mm|F.linear, max-autotune|decode stack, int4 g128)$"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    # `benchmarks` is not installed, and the root of the checkout is not on the path.
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name="": importlib.import_module(f"benchmarks.kernels_gpu{name}")


def test_every_kernel_has_cases_and_every_case_a_meaning() -> None:
    found = list(cases())
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert all(peer in names for case in found for peer in case.against)
    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/launch.py")}
    assert folders == {case.kernel for case in found}
    for case in found:
        if case.peer:
            continue
        rows, inputs = (-(-size // of) * of for size, of in zip((24, 40), case.multiples, strict=True))
        prepared = case.prepare(rows, inputs, torch.bfloat16, torch.device("cpu"))
        work = prepared.work(2)
        # What a product must move: the weight as it is held, the vectors and the result.
        held = sum(tensor.nbytes for tensor in prepared.held.values())
        assert work.flops > 0
        assert 0.4 * held <= work.bytes - 4 * (rows + inputs) <= held
        x = torch.randn(2, inputs, dtype=torch.float64)
        wide = {n: t.double() if n in prepared.learned else t for n, t in prepared.held.items()}
        assert prepared.meant(wide, x).shape == (2, rows)


def test_a_gap_is_measured_against_what_rounding_allows(part: Any) -> None:
    check = part("_check")
    meant = torch.randn(30, 50, dtype=torch.float64)
    assert not check.gap(meant.to(torch.float16), meant, 0).wrong
    assert check.gap(meant.to(torch.float16) * 1.004, meant, 0).wrong
    one = meant.to(torch.float16)
    one[7, 9] += 0.05  # too little to be seen in the norm of all
    assert check.gap(one, meant, 0).wrong
    one[7, 9] = math.nan
    assert check.gap(one, meant, 0).wrong
    assert check.gap(meant[:, :20].half(), meant, 0).wrong


def test_a_wrong_kernel_is_told(part: Any) -> None:
    right = next(case for case in cases() if case.name == "low rank 32 %")

    def prepare(*about: Any) -> Any:
        prepared = right.prepare(*about)

        def run(held: Any, x: torch.Tensor) -> torch.Tensor:
            y = prepared.run(held, x)
            return torch.cat((y[:, :-1], 0 * y[:, -1:]), 1)  # the last output is forgotten

        return dataclasses.replace(prepared, run=run)

    wrong = dataclasses.replace(right, prepare=prepare, dtypes=(torch.bfloat16,))
    told = part("_check").checked(wrong, torch.device("cpu"), quick=True)
    assert {failure.partition(": ")[2].partition(" off")[0] for failure in told["failed"]} == {
        "result", "gradient of x", "gradient of left", "gradient of right",
    }  # fmt: skip

    def fails(*about: Any) -> Any:
        raise RuntimeError("no such instruction")

    told = part("_check").checked(dataclasses.replace(wrong, prepare=fails), torch.device("cpu"), quick=True)
    assert "RuntimeError: no such instruction" in told["failed"][0]


@pytest.mark.slow
def test_the_whole_path(
    part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    asked = ["--device", "cpu", "--quick", "--json", str(file), "--only", ONLY, "--minutes", "600"]
    # Without a minute nothing is measured, and the file says that it can be gone on with.
    assert part().main([*asked, "--minutes", "0"]) == 0
    none = json.loads(file.read_text())
    assert not none["rows"]
    assert "--resume" in none["stopped"]
    assert all(mark["measured"] is None and mark["met"] is None for mark in none["marks"])
    assert "not measured" in capsys.readouterr().out

    assert part().main([*asked, "--resume"]) == 0
    first = json.loads(file.read_text())
    rows = {(row["tokens"], row["name"]): row for row in first["rows"]}
    row = rows[1, "int4 g128"]
    assert row["milliseconds"] > 0
    assert row["error"] <= row["limit"]
    assert not row["wrong"]
    assert row["source"]
    assert row["bytes"] > row["weight bytes"] > 64 * 128 // 2
    assert rows[1, "F.linear"]["ratio"] == 1
    assert rows[1, "decode stack, int4 g128"]["speed"] > 0
    assert (16, "int4 g128") in rows
    assert (16, "low rank 32 %") not in rows
    marks = {mark["mark"]: mark for mark in first["marks"]}
    assert marks["int4 g128, 1 token"]["met"] is False  # in the interpreter
    assert marks["int4 g128, 1 token"]["measured"] == pytest.approx(
        min(rows[1, n]["ratio"] for n in ("F.linear", "F.linear, max-autotune")) / row["ratio"], rel=2e-3
    )
    assert marks["2:4, 4096 tokens"]["measured"] is None
    assert not first["stopped"]

    # Rows of the same source stay as they are, those of another are measured anew.
    changed = json.loads(file.read_text())
    for one in changed["rows"]:
        one["source"] = one["source"] if one["tokens"] == 1 else one["source"] and "another"
    file.write_text(json.dumps(changed))
    session = part("_session")
    measured: list[Any] = []
    honest = session.turn
    monkeypatch.setattr(session, "turn", lambda name, *rest: measured.append(name) or honest(name, *rest))
    assert part().main([*asked, "--resume"]) == 0
    again = {(row["tokens"], row["name"]): row for row in json.loads(file.read_text())["rows"]}
    assert measured == ["F.linear", "int4 g128", "F.linear", "torch _weight_int8pack_mm"]
    assert again[1, "int4 g128"] == row
    assert again[16, "int4 g128"]["source"] == rows[16, "int4 g128"]["source"]
    assert again.keys() == rows.keys()

    changed["machine"]["libraries"]["torch"] = "0.1"
    file.write_text(json.dumps(changed))
    capsys.readouterr()
    assert part().main([*asked, "--resume"]) == 2
    assert "was measured on" in capsys.readouterr().err


def test_a_kernel_that_fails_ends_with_status_1(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Any:
        raise RuntimeError("spoilt")

    spoilt = BenchCase("spoilt", "codes", prepare, kernel="quantized_matmul")
    monkeypatch.setattr(part("_session"), "cases", lambda: iter([spoilt]))
    file = tmp_path / "rows.json"
    assert part().main(["--device", "cpu", "--quick", "--json", str(file), "--only", "spoilt"]) == 1
    found = json.loads(file.read_text())
    assert "spoilt" in found["checks"][0]["failed"][0]
    (first, *_) = [row for row in found["rows"] if row["name"] == "spoilt"]
    assert first["absent"] == "RuntimeError: spoilt"


def test_order_and_marks(part: Any) -> None:
    marks = part("_marks")
    groups = list(marks.plan(list(cases()), marks.LAYERS, marks.TOKENS))
    seen = [(group.layer, group.tokens, name) for group in groups for name in group.names]
    assert len(set(seen)) == len(seen)
    names = {case.name for case in cases()} | {marks.DENSE, marks.STACK}
    for mark in marks.MARKS:
        assert {mark.form, mark.against} <= names
        counts = marks.TOKENS if mark.tokens is None else (mark.tokens,)
        layers = ["32 layers"] if mark.form == marks.STACK else marks.LAYERS
        assert all((layer, count, mark.form) in seen for layer in layers for count in counts)
    last = max(
        i
        for i, group in enumerate(groups)
        for mark in marks.MARKS
        if mark.form in group.names and mark.tokens == group.tokens
    )
    first = min(i for i, group in enumerate(groups) if "nf4 g64" in group.names)
    assert last < first

    def row(name: str, ratio: float, layer: str = "8B down", tokens: int = 1, **more: Any) -> dict[str, Any]:
        return {"layer": layer, "tokens": tokens, "name": name, "ratio": ratio} | more

    layers = {"8B down": (1, 1), "8B up": (1, 1)}
    rows = [row("F.linear", 1.0), row("F.linear, max-autotune", 0.9), row("int4 g128", 0.3, share=0.85)]
    rows += [row("int4 g128 + rank 64", 0.33)]
    found = {m["mark"]: m for m in marks.held(rows, layers, (1,), ["int4 g128"])}
    assert found["int4 g128, 1 token"]["measured"] == 3.0  # beside the faster dense product
    assert found["int4 g128, 1 token"]["met"] is None  # one of two layers
    assert found["int4 g128 + rank 64 beside int4 g128, 1 token"]["met"] is False  # 10 % slower
    assert found["int4 g128: share of the least time, at best"]["met"] is True
    rows += [row("F.linear", 1.0, "8B up"), row("int4 g128", 0.4, "8B up", share=0.5)]
    found = {m["mark"]: m for m in marks.held(rows, layers, (1,), ["int4 g128"])}
    assert found["int4 g128, 1 token"]["measured"] == 2.5  # the worst of all layers
    assert found["int4 g128, 1 token"]["met"] is False
    wrong = [r | {"wrong": True} if r["name"] == "int4 g128" else r for r in rows]
    assert marks.held(wrong, layers, (1,), [])[0]["measured"] is None


def test_the_page_has_every_mark(part: Any) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = page.partition("## Measured on a GPU")[2].partition("\n## ")[0]
    found = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    marks = part("_marks").MARKS
    assert [(row[0].removeprefix("| "), float(row[2])) for row in found] == [
        (mark.name, pytest.approx(mark.at_least, abs=1e-3)) for mark in marks
    ]


def test_pictures_of_what_was_measured(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"layer": "8B down", "peer": False}
    rows = [common | {"name": "F.linear", "family": "dense", "tokens": t, "ratio": 1.0} for t in (1, 16)]
    rows += [common | {"name": "int4 g128", "family": "codes", "tokens": t, "ratio": 0.25 * t**0.25} for t in (1, 16)]
    rows += [common | {"name": "int8", "family": "codes", "tokens": 1, "absent": "no"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": rows}))
    assert part().main(["--json", str(file), "--picture", str(tmp_path / "pictures")]) == 0
    (picture,) = (tmp_path / "pictures").iterdir()
    text = picture.read_text()
    ET.fromstring(text)
    assert "int4 g128, 1 tokens: 4.00x" in text
    assert "int8" not in text
    file.write_text(json.dumps({"rows": rows[:2]}))
    assert part().main(["--json", str(file), "--picture", str(tmp_path / "none")]) == 2
    assert "no measured rows" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ([], ["--device", "cpu"]):
        assert part().main(asked) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "--device cpu --quick" in said
