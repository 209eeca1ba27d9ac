"""The ONNX target: its files, options and messages."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recast
from recast.passes.cache import OperatorCache
from recast.patterns.errors import ArtifactError, TargetError
from recast.patterns.program import Program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    found = recast.capture(model, (torch.randn(3, 5, 64),))
    recipe = {"rules": [{"match": "0", "form": "int8(activations=true)"}], "default": "int4(group=16)"}
    return recast.rewrite(found, recast.plan(found, recipe), cache=OperatorCache(None), pictures=False, measure=False)


@pytest.mark.parametrize("external", [False, True])
def test_saved_and_loaded_gives_the_same_bits(
    program: Program, tmp_path: Path, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    artifact = recast.lower(program, target="onnx", external_data=external)
    artifact.save(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert ("model.onnx.data" in names) == external
    assert "weights.safetensors" not in names
    onnx.checker.check_model(tmp_path / "a" / "model.onnx", full_check=False)
    x = torch.randn(2, 7, 64)
    expected = artifact(x)
    loaded = recast.load(tmp_path / "a")
    assert torch.equal(loaded(x), expected)
    assert loaded.report.to_dict() == artifact.report.to_dict()
    assert {row.name: row.kernel for row in loaded.report.rows} == artifact.lowering.kernels(program)
    loaded.save(tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert torch.equal(recast.load(tmp_path / "b")(x), expected)
    assert not list(scratch.iterdir())


def test_two_exports_are_the_same_bytes_and_name_no_place(program: Program, tmp_path: Path) -> None:
    for name in ("a", "b"):
        recast.lower(program, target="onnx").save(tmp_path / name)
    first = (tmp_path / "a" / "model.onnx").read_bytes()
    assert first == (tmp_path / "b" / "model.onnx").read_bytes()
    assert str(Path(recast.__file__).parent).encode() not in first
    assert b".py" not in first


def test_a_damaged_file_is_refused(program: Program, tmp_path: Path) -> None:
    recast.lower(program, target="onnx").save(tmp_path / "a")
    path = tmp_path / "a" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx.*damaged"):
        recast.load(tmp_path / "a")


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    program: Program, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(TargetError, match=rf"{missing} .*pip install 'recast\[onnx\]'"):
        recast.lower(program, target="onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"opset": 17}, "at least 21"), ({"accuracy_level": 3}, "0 .exact. or 4"), ({"precision": 1}, "precision")],
)
def test_options_are_checked(program: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        recast.lower(program, target="onnx", **options)


def test_rounding_inside_four_bit_products_is_asked_for(program: Program) -> None:
    x = torch.randn(2, 7, 64)
    exact, rounded = (recast.lower(program, target="onnx", accuracy_level=level)(x) for level in (0, 4))
    error = float((exact - rounded).norm() / exact.norm())
    assert 0 < error < 0.03


def test_inputs_that_do_not_fit_are_refused(program: Program, tmp_path: Path) -> None:
    recast.lower(program, target="onnx").save(tmp_path / "a")
    with pytest.raises(TargetError, match="refused the call"):
        recast.load(tmp_path / "a")(torch.randn(2, 7, 63))
