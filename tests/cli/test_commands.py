import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import recast
from recast import listing
from recast.lowering import pays
from tests.cli.conftest import Done

Cli = Callable[..., Done]
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_help_of_every_command_shows_an_example(cli: Cli) -> None:
    done = cli("--help")
    assert done.status == 0
    for command in ("demo", "inspect", "optimize", "compare", "forms", "explain", "replay"):
        assert command in done.out
        shown = cli(command, "--help")
        assert shown.status == 0
        assert f"Example: recast {command}" in shown.out
        assert "--json" in shown.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"recast {recast.__version__}\n"


def test_inspect_prints_sites_and_misses(cli: Cli, here: Path) -> None:
    done = cli("inspect", "little:make", "--graph")
    assert done.status == 0
    assert "up " in done.out
    assert "64×32" in done.out
    assert "little.py:" in done.out
    assert "= linear(x, up.weight" in done.out


def test_inspect_json_is_the_coverage(cli: Cli, here: Path) -> None:
    data = cli("inspect", "little:make", "--json").json
    assert data["parameters"] == {"total": 4096, "matched": 4096}
    assert data["sites"]["linear"] == 2
    assert [s["name"] for s in data["site_list"] if s["kind"] == "linear"] == ["up", "down"]
    (block,) = [s for s in data["site_list"] if s["kind"] == "mlp"]
    assert (block["up"], block["down"]) == ("up", "down")
    assert data["misses"]
    assert all(m["reason"] for m in data["misses"])


def test_explain_says_what_a_place_is(cli: Cli, here: Path) -> None:
    assert "matches the pattern 'linear'" in cli("explain", "little:make", "up").out
    assert cli("explain", "little:make", "up.weight", "--json").json["what"] == "site"
    assert cli("explain", "little:make", "scale", "--json").json["what"] == "vector"
    miss = cli("inspect", "little:make", "--json").json["misses"][0]
    found = cli("explain", "little:make", miss["name"], "--json").json
    assert found["what"] == "miss"
    assert miss["reason"] in found["text"]
    unknown = cli("explain", "little:make", "dwon")
    assert unknown.status == 2
    assert "did you mean 'down'" in unknown.err


def test_forms_lists_parameters_and_kernels(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path / "kept"))
    asked = ("low_rank", "fwsvd", "low_rank(rank=4) | int8")
    forms = cli("forms", *asked, "--json").json["forms"]
    assert [f["name"] for f in forms] == ["fwsvd", "low_rank", ""]
    assert any(p["name"] == "ratio" for p in forms[1]["parameters"])
    assert "loss" in forms[0]["targets"]["eager"]
    assert all(row["targets"]["eager"] for row in forms)
    assert forms[1]["about"].startswith("W ≈ B A")
    assert "Examples" not in forms[1]["about"]
    # A rank of 4 in eight bits, a scale of four bytes for each of its 4100 rows.
    assert forms[2]["size"]["bytes"] == 4 * 8192 + 4 * 4100
    assert forms[2]["size"]["share of operations"] == 4 * 8192 / 4096**2
    assert forms[1]["size"]["bytes"] == forms[1]["size"]["share of bytes"] * 2 * 4096**2

    def again(*_: Any) -> None:
        raise AssertionError("lowered again")

    monkeypatch.setattr(listing, "_branches", again)  # what was found is kept
    shown = cli("forms", *asked).out
    assert "low_rank" in shown
    assert "int8" in shown
    assert "of a weight 4096 x 4096 in bfloat16" in shown
    assert cli("forms", *asked, "--json").json["forms"] == forms


@pytest.mark.parametrize(
    ("asked", "says"), [("low_rnk", "low_rank"), ("low_rank(", "low_rank("), ("monarch(blocks=7)", "64")]
)
def test_forms_refuses_what_is_none(cli: Cli, asked: str, says: str) -> None:
    done = cli("forms", asked)
    assert done.status == 2
    assert says in done.err
    assert "Traceback" not in done.err


def test_optimize_then_compare_a_function(cli: Cli, here: Path) -> None:
    done = cli("optimize", "little:make", "-r", "int8", "-c", "x.safetensors", "-t", "eager", "-o", "small", "--json")
    assert done.status == 0, done.err
    assert done.json["sites"][0]["measured_error"] > 0
    assert {p.name for p in (here / "small").iterdir()} >= {"recast.json", "report.html", "report.json", "plan.yaml"}
    assert not leftovers(here)
    again = cli("optimize", "little:make", "-r", "int4", "-t", "eager", "-o", "small")
    assert again.status == 2
    assert "--force" in again.err
    assert (
        cli("optimize", "little:make", "-r", "low_rank(ratio=0.5)", "-t", "eager", "-o", "small2", "--force").status
        == 0
    )
    compared = cli("compare", "little:make", "small", "small2", "--on", "x.safetensors", "--rounds", 1, "--json")
    assert compared.status == 0, compared.err
    rows = compared.json["rows"]
    assert [r["name"] for r in rows] == ["little:make", "small", "small2"]
    assert rows[0]["fidelity"]["worst_cosine"] == 1
    assert rows[1]["fidelity"]["mean_cosine"] > rows[2]["fidelity"]["mean_cosine"]
    assert all(r["milliseconds"] > 0 and r["bytes"] > 0 for r in rows)
    shown = cli("compare", "small", "small", "--on", "x.safetensors", "--rounds", 1, "--report", "page.html")
    assert "1.00000" in shown.out
    assert (here / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_optimize_leaves_dense_what_is_slower(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(operator: Any, target: str, tokens: list[int]) -> pays.Times:
        return pays.Times(dict.fromkeys(tokens, 1e-3), dict.fromkeys(tokens, 2e-3))

    monkeypatch.setattr(pays, "time_operator", slow)
    done = cli("optimize", "little:make", "-r", "int8", "-t", "eager", "--tokens", "1,128", "-o", "small", "--json")
    assert done.status == 0, done.err
    assert not done.json["sites"]
    assert all("2 against 1 ms at 128 tokens" in skip["reason"] for skip in done.json["skipped"])
    every = cli("optimize", "little:make", "-t", "eager", "--tokens", "1", "--allow-slower", "-o", "all", "--json")
    assert len(every.json["sites"]) == 2


@pytest.mark.parametrize("form", ["int8", "int4 + low_rank(4)"])
def test_the_same_command_writes_the_same_bytes(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Whether fits are new or were kept on disk."""
    monkeypatch.setenv("RECAST_CACHE", str(here / "anew"))
    written = []
    for folder in ("a", "b"):
        done = cli("optimize", "little:make", "-r", form, "-c", "x.safetensors", "-t", "eager", "-o", folder)
        assert done.status == 0, done.err
        written.append({p.name: p.read_bytes() for p in (here / folder).iterdir()})
    assert [n for n in written[0].keys() | written[1].keys() if written[0].get(n) != written[1].get(n)] == []


def test_optimize_in_order(cli: Cli, here: Path) -> None:
    asked = ("optimize", "little:keyword", "-r", "low_rank(4)", "-t", "eager")
    first = cli(
        *asked, "-c", "x.safetensors", "-o", "a", "--sequential", "--save-statistics", "behind.safetensors", "--json"
    )
    assert first.status == 0, first.err
    assert recast.Calibration.load(here / "behind.safetensors").behind
    second = cli(*asked, "-c", "behind.safetensors", "-o", "b", "--json")
    assert second.status == 0, second.err
    errors = [[site["predicted_error"] for site in run.json["sites"]] for run in (first, second)]
    assert errors[0] == errors[1]
    other = cli("optimize", "little:keyword", "-r", "int8", "-t", "eager", "-c", "behind.safetensors", "-o", "c")
    assert other.status == 2
    assert "gathered behind sites rewritten by recipe" in other.err


def test_optimize_by_plan_statistics_and_budget(cli: Cli, here: Path) -> None:
    first = cli(
        "optimize", "little:keyword", "-r", "int8", "-c", "x.safetensors", "-t", "eager", "-o", "a", "--budget", "0.4x",
        "--save-plan", "plan.yaml", "--save-statistics", "statistics.safetensors",
    )  # fmt: skip
    assert first.status == 0, first.err
    edited = yaml.safe_load((here / "plan.yaml").read_text(encoding="utf-8"))
    edited["sites"]["up"] = {"form": "int4"}
    (here / "plan.yaml").write_text(yaml.safe_dump(edited), encoding="utf-8")
    second = cli(
        "optimize",
        "little:keyword",
        "--plan",
        "plan.yaml",
        "-c",
        "statistics.safetensors",
        "-t",
        "eager",
        "-o",
        "b",
        "--json",
    )
    assert second.status == 0, second.err
    assert {s["name"]: s["form"] for s in second.json["sites"]} == {"up": "int4", "down": "int8"}
    both = cli("optimize", "little:keyword", "--plan", "plan.yaml", "-r", "int8", "-o", "c", "-t", "eager")
    assert both.status == 2
    other = cli("optimize", "little:other", "-r", "int8", "-c", "statistics.safetensors", "-t", "eager", "-o", "c")
    assert other.status == 2
    assert "belong to model" in other.err


def test_optimize_measures_drift_where_the_recipe_asks_for_it(cli: Cli, here: Path) -> None:
    form = "shared_atoms(1, group=2, across='drift')"
    where = ("optimize", "little:layered", "-t", "eager", "-o", "a", "--force")
    plain = cli(*where, "-r", "int8", "-c", "x.safetensors", "--save-statistics", "plain.safetensors")
    assert plain.status == 0, plain.err
    for given, found in (((), "there is no calibration"), (("-c", "plain.safetensors"), "was made without")):
        refused = cli(*where, "-r", form, *given)
        assert refused.status == 2
        assert found in refused.err
    kept = ("--save-plan", "plan.yaml", "--save-statistics", "drift.safetensors")
    first = cli(*where, "-r", form, "-c", "x.safetensors", *kept, "--json")
    assert first.status == 0, first.err
    assert len(first.json["sites"]) >= 2
    again = cli(*where, "--plan", "plan.yaml", "-c", "drift.safetensors", "--json")
    assert again.status == 0, again.err
    assert [s["bytes_after"] for s in again.json["sites"]] == [s["bytes_after"] for s in first.json["sites"]]
    # By the plan alone, statistics are made anew with what it needs.
    anew = cli(*where, "--plan", "plan.yaml", "-c", "x.safetensors", "--json")
    assert anew.status == 0, anew.err


def test_a_missed_threshold_exits_with_one(cli: Cli, here: Path) -> None:
    text = (here / "little.py").read_text(encoding="utf-8")
    text += (
        "\n\nclass Partly(Net):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = torch.nn.Conv1d(5, 5, 3, padding=1)\n"
        "    def forward(self, x):\n        return super().forward(self.conv(x))\n\n\n"
        "def partly():\n    return Partly().eval(), (torch.randn(2, 5, 32),)\n"
    )
    (here / "little.py").write_text(text, encoding="utf-8")
    for command in (["inspect", "little:partly"], ["optimize", "little:partly", "-t", "eager", "-o", "out"]):
        done = cli(*command, "--min-coverage", "0.999")
        assert done.status == 1, done.err
        assert "conv" in done.err
        assert not (here / "out").exists()


def test_huggingface_directory_from_text_to_artifact(cli: Cli, tiny: Path, here: Path) -> None:
    (here / "text.txt").write_text("the tree is a graph .\n\na graph is walked .\nthe matrix\n", encoding="utf-8")
    lines = [json.dumps({"text": t}) for t in ("the graph is a tree", "a matrix")]
    (here / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = cli(
        "optimize", tiny, "-r", "int8", "-c", "text.txt", "-t", "eager", "-o", "small", "--batch-size", 2, "--json"
    )
    assert done.status == 0, done.err
    assert len(done.json["sites"]) == 13
    artifact = recast.load(here / "small")
    ids = torch.randint(0, 12, (3, 7))
    assert artifact(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape == (3, 7, 32)
    compared = cli("compare", tiny, "small", "--on", "text.jsonl", "--rounds", 1, "--json")
    assert compared.status == 0, compared.err
    assert compared.json["rows"][1]["fidelity"]["worst_cosine"] > 0.999


def test_of_several_outputs_the_worst_is_told() -> None:
    from recast.comparison import Agreement, _agree, _figures

    agreements: list[Agreement] = []
    reference = [torch.ones(2, 3), torch.eye(3), torch.ones(1)]
    _agree(agreements, reference, [torch.ones(2, 3), torch.eye(3) + 0.25], None)
    figures = _figures(agreements)
    assert figures["fidelity"] == {**figures["outputs"][1], "output": 1}
    assert figures["outputs"][0]["relative_error"] == 0 < figures["fidelity"]["relative_error"]
    with pytest.raises(ValueError, match=r"output 1 has shape \(2,\)"):
        _agree([], reference, [torch.ones(2, 3), torch.ones(2)], None)


@needs_onnx
def test_onnx_from_optimize_to_inspect_and_compare(cli: Cli, here: Path) -> None:
    done = cli("optimize", "little:keyword", "-r", "int8", "-t", "onnx", "-o", "small", "--json")
    assert done.status == 0, done.err
    data = cli("inspect", "small/model.onnx", "--json").json
    assert data["sites"]["linear"] >= 2
    compared = cli(
        "compare", "little:keyword", "small", "small/model.onnx", "--on", "x.safetensors", "--rounds", 1, "--json"
    )
    assert compared.status == 0, compared.err
    assert [r["target"] for r in compared.json["rows"]] == ["pytorch", "onnx", "onnxruntime"]
    assert all(r["fidelity"]["mean_cosine"] > 0.999 for r in compared.json["rows"])
    again = cli("optimize", "small/model.onnx", "-r", "int4", "-o", "b", "--json")
    assert again.status == 0, again.err
    assert again.json["sites"] == []  # what is quantized already is left alone


def test_as_a_process_with_only_json_on_standard_output(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recast", "inspect", "little:make", "--json"],
        cwd=here, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"]["linear"] == 2
    assert done.stderr == ""


@needs_onnx
def test_compare_finds_where_an_onnx_model_differs(cli: Cli, here: Path) -> None:
    for recipe, out in (("dense", "same"), ("int8", "other")):
        assert cli("optimize", "little:make", "-r", recipe, "-t", "onnx", "-o", out).status == 0
    done = cli("compare", "little:make", "same", "other", "--on", "x.safetensors", "--bisect", "--tolerance", 1e-4)
    assert done.status == 0, done.err
    same, other = done.out.strip().split("\nother: ")
    assert same.startswith("same: agrees to ")
    assert "first at" in other
    assert "up" in other
    data = cli(
        "compare", "little:make", "other", "--on", "x.safetensors", "--bisect", "--tolerance", 1e-4, "--json"
    ).json
    assert data["differences"]["other"]["where"] == "up"
    refused = cli("compare", "little:make", "little:other", "--on", "x.safetensors", "--bisect")
    assert refused.status == 2
    assert "looks into ONNX models" in refused.err
