"""The commands on ``.onnx`` files: what they print, what they write, and what they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import save_file

from recast.models import Model
from tests.patterns.test_onnx_in import changed, dense, external, nbits, with_unknown

Cli = Callable[..., Any]


def refused(done: Any, *said: str, folder: Path | None = None) -> None:
    assert done.status == 2
    assert done.err.count("\n") == 1, done.err
    for text in said:
        assert text in done.err
    if folder is not None:
        assert not (folder / "out").exists()


def test_optimize_writes_an_onnx_file_by_default(cli: Cli, here: Path) -> None:
    path = dense(here / "dense.onnx")
    save_file({"x_0": torch.randn(12, 5, 16)}, here / "data.safetensors")
    done = cli("optimize", path, "-r", "low_rank(rank=6)", "-c", "data.safetensors", "-o", "out", "--json")
    assert done.status == 0, done.err
    assert [site["name"] for site in done.json["sites"]] == ["net.dense", "net.out"]
    written = onnx.load(here / "out" / "model.onnx")
    assert [value.name for value in written.graph.output] == ["y"]
    compared = cli("compare", path, "out", "--on", "data.safetensors", "--rounds", 1, "--json")
    assert compared.status == 0, compared.err
    assert [row["target"] for row in compared.json["rows"]] == ["onnxruntime", "onnx"]
    assert compared.json["rows"][1]["fidelity"]["mean_cosine"] > 0.8


def test_inspect_tells_sites_operators_and_what_is_left_alone(cli: Cli, here: Path) -> None:
    data = cli("inspect", nbits(here / "nbits.onnx"), "--json").json
    assert data["sites"]["linear"] == 3
    assert [site["name"] for site in data["site_list"] if not site.get("quantized")] == ["head"]
    assert data["operators"] == {"MatMul": 2, "MatMulNBits": 1, "DequantizeLinear": 1}
    assert [(k["operator"], k["reason"]) for k in data["kept"]] == [
        ("com.microsoft::MatMulNBits", "quantized already"),
        ("DequantizeLinear", "quantized already"),
    ]
    done = cli("inspect", with_unknown(here / "unknown.onnx"))
    assert done.status == 0
    assert "the ONNX operator Shrink is left as it is: an operator unknown here" in done.out


def test_inspect_lists_what_nothing_can_run(cli: Cli, here: Path) -> None:
    def fancy(model: onnx.ModelProto) -> None:
        model.graph.node[2].CopyFrom(helper.make_node("Fancy", ["b"], ["c"], domain="my.ops"))
        model.opset_import.append(helper.make_opsetid("my.ops", 1))

    path = changed(dense(here / "dense.onnx"), fancy)
    data = cli("inspect", path, "--json").json
    assert data["operators"]["Fancy"] == 1
    assert "does not know my.ops::Fancy" in data["notes"][0]
    refused(cli("optimize", path, "-o", "out"), "does not know my.ops::Fancy", folder=here)


def test_bad_files(cli: Cli, here: Path) -> None:
    whole = dense(here / "dense.onnx").read_bytes()
    (here / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (here / "text.onnx").write_text("not a model", encoding="utf-8")
    old = changed(here / "dense.onnx", lambda m: setattr(m.opset_import[0], "version", 5))
    for command in (["inspect"], ["optimize", "-o", "out"]):
        refused(cli(*command, "cut.onnx"), "cut.onnx", folder=here)
        refused(cli(*command, "text.onnx"), "not an ONNX model", folder=here)
        refused(cli(*command, "none.onnx"), "there is no file", folder=here)
        refused(cli(*command, old), "opset 5, which is too old", folder=here)
        refused(cli(*command, external(here / "a", "../weights.bin")), "outside the model's folder", folder=here)
        refused(cli(*command, external(here / "b", "gone.bin")), "which is not there", folder=here)
        refused(cli(*command, external(here / "c", offset=100)), "cut short", folder=here)


def test_a_weight_outside_is_refused_before_onnxruntime_opens_the_file(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(Model, "session", property(lambda self: opened.append(self.label)))
    refused(cli("compare", external(here / "a", "/etc/passwd"), "--on", "x.safetensors"), "outside the model's folder")
    assert opened == []


def test_a_tokenizer_is_found_beside_the_folder_named_onnx(here: Path) -> None:
    from recast.models import load_model

    (here / "onnx").mkdir()
    (here / "tokenizer.json").write_text("{}", encoding="utf-8")
    dense(here / "onnx" / "model.onnx")
    assert load_model(str(here / "onnx" / "model.onnx")).directory == here
