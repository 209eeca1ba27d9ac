"""What `benchmarks.load_onnx` makes, and how it tells memory of a process from pages of files."""

import importlib
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    # `benchmarks` is not installed, and the root of the checkout is not on the path.
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.load_onnx")


@pytest.mark.parametrize("megabytes", [1, 64, 100, 1024])
def test_the_model_is_about_as_large_as_asked(benchmark: Any, megabytes: int) -> None:
    layers, width = benchmark.sizes(megabytes)
    assert megabytes * 0.7 <= 4 * layers * width * width / 2**20 <= megabytes


def test_mapped_pages_are_told_from_those_of_the_process(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    before = benchmark.memory()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        assert sum(held[:: mmap.PAGESIZE]) == 0
        mapped = benchmark.memory()
    own = torch.ones(16 << 20)
    after = benchmark.memory()
    assert mapped["of files"] - before["of files"] > 60
    assert mapped["own"] - before["own"] < 16
    assert after["own"] - before["own"] > own.nbytes / 2**20 - 4
    assert after["peak"] >= mapped["held"]


def test_every_way_loads_and_runs(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    benchmark.make(tmp_path, 1, "dense")
    width = benchmark.sizes(1)[1]
    for name in benchmark.WAYS:
        found = benchmark.one(name, tmp_path, 1, width)
        assert found["load s"] > 0
        assert {"own MiB, loaded", "of files MiB, loaded", "peak MiB"} <= set(found)
    assert (tmp_path / "artifact" / "model.onnx.data").stat().st_size >= 1 << 20
    assert benchmark.nbytes(tmp_path / "artifact") > (tmp_path / "artifact" / "model.onnx.data").stat().st_size
