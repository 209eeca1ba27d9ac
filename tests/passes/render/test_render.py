import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import recast
from recast.passes.cache import OperatorCache
from recast.passes.plan import Skip
from recast.passes.render import comparison_table, page, table_text
from recast.passes.render.svg import scatter, spectrum
from recast.passes.report import Report, SiteRow, fidelity

EVIL = '<script>alert("x")</script>[bold]&\'q'
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Checker(HTMLParser):
    """Tags close in order; what the page refers to, and the text it shows, are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.shown: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    return checker


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.Linear(32, 2)
    )
    program = recast.capture(model.eval(), (torch.randn(4, 32),))
    cache = OperatorCache(None)
    calibration = recast.calibrate(program, [torch.randn(16, 32)], progress=False)
    recipe = {"default": "int8", "rules": [{"match": "3", "form": "dense"}]}
    plan = recast.plan(program, recipe, calibration, cache=cache, progress=False)
    found: Report = recast.rewrite(program, plan, cache=cache, progress=False).report
    return found


def evil(report: Report) -> Report:
    rows = [dataclasses.replace(report.rows[0], name=EVIL, form=EVIL, kernel=EVIL), *report.rows[1:]]
    miss = {"name": EVIL, "kind": EVIL, "parameters": 3, "reason": EVIL}
    coverage = {**report.coverage, "misses": [miss]}
    return dataclasses.replace(
        report, model=EVIL, rows=rows, skipped=[Skip(EVIL, EVIL)], coverage=coverage, notes=[EVIL], target=EVIL
    )


ROWS = [
    {"name": "dense", "target": "eager", "bytes": 1000, "milliseconds": 2.0, "fidelity": {"mean_cosine": 1.0}},
    {"name": EVIL, "target": "eager", "bytes": 250, "milliseconds": 1.0, "fidelity": {"worst_cosine": 0.9}},
    {"name": "lost", "target": "onnx", "bytes": None, "milliseconds": None, "fidelity": {}, "error": EVIL},
]


def test_table_has_every_site_and_the_skipped_ones(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = str(report)
    assert text == table_text(report) == table_text(report, width=120)
    for row in report.rows:
        assert re.search(rf"^ {row.name} +int8 ", text, re.MULTILINE)
    assert "dense by the recipe (rule '3')" in text
    assert "coverage 100.0%" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_where_a_table_does_not_fit_each_site_is_a_few_lines(report: Report) -> None:
    name = "encoder.layer.0.attention.self.query"
    long = dataclasses.replace(
        report, rows=[dataclasses.replace(report.rows[0], name=name, kernel="MatMulIntegerToFloat")]
    )
    text = table_text(long, width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert re.search(rf"^{re.escape(name)}$", text, re.MULTILINE)
    row = text.split(name)[1].split("Left dense")[0]
    assert re.search(r"form int8, shape .*bytes .*FLOPs .*predicted .*measured", " ".join(row.split()))
    assert "kernel MatMulIntegerToFloat" in " ".join(row.split())


def test_operations_and_bytes_are_told_before_and_after(report: Report) -> None:
    """Twice the work is nothing that reads like a saving."""
    row = dataclasses.replace(report.rows[0], flops_before=70_000, flops_after=75_300)
    more = dataclasses.replace(report, rows=[row], bytes_before=3_000, bytes_after=4_000)
    text = table_text(more, width=200)
    assert "70.0 k → 75.3 k" in text
    assert "3.00 kB → 4.00 kB (1.33× larger)" in text
    assert "3.00 kB before, 1.33× larger" in page(more)
    fewer = dataclasses.replace(more, rows=[dataclasses.replace(row, flops_after=35_000)], bytes_after=1_500)
    assert "70.0 k → 35.0 k" in table_text(fewer, width=200)
    assert "(2.00× smaller)" in table_text(fewer)


def test_table_shows_markup_in_names_as_it_is(report: Report) -> None:
    text = "".join(table_text(evil(report), width=400).split())
    assert "".join(EVIL.split()) in text


def test_page_is_one_file_of_wellformed_html_with_everything_in_it(report: Report) -> None:
    text = page(report, rows=ROWS)
    found = checked(text)
    assert not found.references
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://", text)
    shown = html.unescape("".join(found.shown))
    for row in report.rows:
        assert row.name in shown
    for part in (
        "Model map",
        "Predicted and measured error",
        "Singular values",
        "Left dense",
        "Passes",
        "Coverage",
        "lossy",
    ):
        assert part in shown
    assert found.tags.count("svg") == 1 + len(report.rows)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_page_escapes_names(report: Report) -> None:
    text = page(evil(report), title=EVIL, rows=ROWS, remark=EVIL)
    assert "<script" not in text
    assert EVIL in "".join(checked(text).shown)


def test_page_of_several_reports_folds_all_but_the_first(report: Report) -> None:
    text = page({"a": report, "b": report}, title="both")
    assert text.count("<details open>") == 1
    assert text.count("<details>") == 1
    checked(text)


def test_page_without_data_without_rows_and_without_sites(report: Report) -> None:
    bare = Report("empty", [], [], 0, 0)
    assert "Model map" not in page(bare)
    row = SiteRow("a", "int8", (2, 2), 16, 4, 8, 8, 0.0, None, 0.0)
    text = page(dataclasses.replace(report, rows=[row], whole={}, passes={}))
    assert "there was no calibration data" in text
    checked(text)
    checked(page({}, rows=ROWS))


def test_report_survives_json(report: Report) -> None:
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert page(again) == page(report)


def test_comparison_is_with_the_first_or_the_first_of_the_target() -> None:
    from rich.console import Console

    rows = [
        {"name": "dense", "target": t, "bytes": 100, "milliseconds": m, "fidelity": {}}
        for t, m in (("a", 4.0), ("b", 2.0))
    ]
    rows.append({"name": "small", "target": "b", "bytes": 50, "milliseconds": 1.0, "fidelity": {}})
    for per_target, faster in ((False, "4.00×"), (True, "2.00×")):
        console = Console(width=150, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        console.print(comparison_table(rows, per_target=per_target))
        line = next(x for x in console.export_text().splitlines() if x.strip().startswith("small"))
        assert faster in line
        console.file.close()


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0], [1.0, 1e-9, 0.0]])
def test_spectrum_stays_inside_its_picture(values: list[float]) -> None:
    numbers = [float(n) for n in re.findall(r"[ML](?:-?[\d.]+) (-?[\d.]+)", spectrum(values, "w"))]
    assert all(0 <= n <= 110 for n in numbers)


def test_scatter_of_equal_nonpositive_or_infinite_points() -> None:
    assert scatter([], "x", "y") == ""
    assert scatter([(0.0, 0.1, "a"), (float("inf"), 0.1, "b")], "x", "y") == ""
    assert scatter([(0.1, 0.1, "a"), (0.1, 0.1, "b")], "x", "y").count("<circle") == 2


def test_padding_does_not_count_in_the_error_of_outputs() -> None:
    words, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    other = words.clone()
    other[1, 2:] = -words[1, 2:]
    assert fidelity(words, other)["worst_cosine"] < -0.99
    assert fidelity(words, other, mask)["relative_error"] == 0
    assert fidelity(words, other, 0 * mask) == fidelity(words, other)
    assert fidelity(words[:, 0], other[:, 0], mask)["worst_cosine"] > 0.99
