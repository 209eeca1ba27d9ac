"""Fitted operators: fitted once, kept on disk, safe against other processes, damage and released weights."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recast.passes.cache import OperatorCache, cache_directory
from recast.passes.forms.form import Form
from recast.passes.forms.operator import Operator, common_tensors
from recast.passes.forms.stats import Stats
from recast.patterns.errors import WeightError
from recast.patterns.linear.find import Matrix

INT8, LOW = Form.parse("int8"), Form.parse("low_rank(rank=3) | int8")


def matrix(weight: Tensor) -> Matrix:
    storage = weight.untyped_storage()
    place = (storage._cdata, weight.storage_offset(), weight.stride(), tuple(weight.shape), weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    return Matrix(shape, weight.dtype, place, (storage,), weight._version, weight.detach)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 32)


@pytest.fixture
def stats() -> Stats:
    return Stats.from_inputs(torch.randn(50, 32), sample=16)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_fitted_once_in_memory_and_once_on_disk(tmp_path: Path, weight: Tensor, stats: Stats) -> None:
    cache = OperatorCache(tmp_path)
    first = cache.fit(matrix(weight), LOW, stats)
    assert cache.fit(matrix(weight), LOW, stats) is first
    assert cache.fit(matrix(weight.clone()), LOW, stats) is first, "known by what it holds"
    assert (cache.fits, cache.hits) == (1, 2)
    other = OperatorCache(tmp_path)
    again = other.fit(matrix(weight), LOW, stats)
    assert (other.fits, other.hits) == (0, 1)
    assert (again.weight_error, again.predicted_error, again.measured_error) == (
        first.weight_error, first.predicted_error, first.measured_error
    )  # fmt: skip
    for name, tensor in first.operator.tensors().items():
        assert torch.equal(tensor, again.operator.tensors()[name])
    assert len(files(tmp_path)) == 1


def test_another_weight_form_or_statistics_is_another_operator(tmp_path: Path, weight: Tensor, stats: Stats) -> None:
    cache = OperatorCache(tmp_path)
    cache.fit(matrix(weight), LOW, stats)
    cache.fit(matrix(weight), INT8, stats)
    cache.fit(matrix(weight), LOW, None)
    cache.fit(matrix(weight), LOW, Stats.from_inputs(torch.randn(50, 32)))
    cache.fit(matrix(weight.bfloat16()), INT8, stats)
    changed = weight.clone()
    changed[0, 0] += 1e-6
    cache.fit(matrix(changed), LOW, stats)
    assert (cache.fits, cache.hits) == (6, 0)
    assert len(files(tmp_path)) == 6


def test_a_weight_changed_in_place_is_fitted_again(weight: Tensor) -> None:
    cache = OperatorCache(None)
    first = cache.fit(matrix(weight), INT8, None)
    weight.mul_(2)
    second = cache.fit(matrix(weight), INT8, None)
    assert cache.fits == 2
    torch.testing.assert_close(second.operator.to_dense(), 2 * first.operator.to_dense())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_file_is_fitted_again(tmp_path: Path, weight: Tensor, damage: str) -> None:
    first = OperatorCache(tmp_path).fit(matrix(weight), INT8, None)
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-7] ^= 1
    broken = {"flip": bytes(data), "cut": bytes(data[:-40]), "empty": b"", "text": b"hello"}[damage]
    file.write_bytes(broken)
    cache = OperatorCache(tmp_path)
    again = cache.fit(matrix(weight), INT8, None)
    assert cache.fits == 1
    assert torch.equal(first.operator.to_dense(), again.operator.to_dense())
    assert file.read_bytes() != broken, "and written anew"


def test_released_weights_are_known_by_their_place(weight: Tensor) -> None:
    cache = OperatorCache(None)
    known = matrix(weight)
    first = cache.fit(known, INT8, None)
    weight.untyped_storage().resize_(0)
    assert cache.fit(known, INT8, None) is first
    with pytest.raises(WeightError, match="the dense weight of 'here' was released before 'low_rank"):
        cache.fit(known, LOW, None, where="here")


def test_memory_that_was_freed_and_given_out_again_is_not_mistaken() -> None:
    cache = OperatorCache(None)
    for value in range(20):
        weight = torch.full((8, 8), float(value + 1))  # likely to lie where the last one lay
        dense = cache.fit(matrix(weight), INT8, None).operator.to_dense()
        assert float((dense - weight).abs().max()) <= (value + 1) / 127 / 2  # half a step of 8 bits
        del weight


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, weight: Tensor) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = OperatorCache(blocked)
    cache.fit(matrix(weight), INT8, None)
    assert cache.fits == 1
    assert blocked.read_text() == "in the way"


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from recast.passes import unfinished as module

    def full(tensors: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    OperatorCache(tmp_path).fit(matrix(weight), INT8, None)
    assert files(tmp_path) == []


def test_an_interruption_leaves_no_half_file(tmp_path: Path, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from recast.passes import unfinished as module

    def interrupt(tensors: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        OperatorCache(tmp_path).fit(matrix(weight), INT8, None)
    assert files(tmp_path) == []


def test_threads_writing_at_once(tmp_path: Path, weight: Tensor) -> None:
    threads = [
        threading.Thread(target=lambda: OperatorCache(tmp_path).fit(matrix(weight), INT8, None)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(tmp_path)) == 1
    cache = OperatorCache(tmp_path)
    cache.fit(matrix(weight), INT8, None)
    assert (cache.fits, cache.hits) == (0, 1)


def test_two_processes_writing_at_once(tmp_path: Path) -> None:
    """Each writes the same operators while the other reads them: all are whole."""
    code = f"""
import torch, recast
from pathlib import Path
from recast.passes.cache import OperatorCache
torch.manual_seed(0)
program = recast.capture(torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(6)]).eval(), (torch.randn(2, 16),))
for _ in range(4):
    cache = OperatorCache(Path({str(tmp_path)!r}))
    recast.plan(program, {{"default": "int8", "allow_larger": True}}, cache=cache)
    assert cache.fits + cache.hits == 6
print(cache.fits)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == "0", "the last round finds all on disk"
    assert len(files(tmp_path)) == 6
    assert all(p.suffix == ".safetensors" for p in files(tmp_path))


def test_where_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("RECAST_CACHE", "off")
    assert cache_directory() is None
    monkeypatch.delenv("RECAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "recast"


@pytest.mark.parametrize("shape", [(60, 63), (1, 63), (63, 1)])
@pytest.mark.parametrize(
    "form", ["int8", "low_rank(rank=1)", "low_rank(rank=1) | int8", "int8 + low_rank(rank=1)", "dense"]
)
def test_what_comes_from_disk_lies_in_memory_as_what_was_fitted(
    tmp_path: Path, shape: tuple[int, int], form: str
) -> None:
    """Other strides or another alignment are rounded differently, and would be written to an artifact."""

    def layouts(operator: Operator) -> dict[str, tuple[Any, ...]]:
        return {n: (tuple(t.shape), t.stride(), t.data_ptr() % 64) for n, t in operator.tensors().items()}

    memory = torch.randn(shape[0] * shape[1] + 1)
    weight = memory[1:].reshape(shape)  # four bytes behind an aligned place
    x = torch.randn(5, shape[1])
    found = []
    for folder in (tmp_path, tmp_path, None):
        fitted = OperatorCache(folder).fit(matrix(weight), Form.parse(form), None)
        found.append((layouts(fitted.operator), fitted.operator.nbytes, fitted.operator.apply(x).tolist()))
    assert found[0] == found[1] == found[2]
    assert all(at == 0 for _, _, at in found[0][0].values())


def test_what_several_hold_in_common_stays_common(tmp_path: Path) -> None:
    weights = [torch.randn(24, 32), torch.randn(24, 32)]
    form = Form.parse("shared_atoms(2, group=2)")
    found = [
        OperatorCache(folder).fit_together([matrix(w) for w in weights], form, [None, None])
        for folder in (tmp_path, tmp_path, None)
    ]
    held = []
    for fits in found:
        tensors = {f"{i}.{n}": t for i, fit in enumerate(fits) for n, t in fit.operator.tensors().items()}
        held.append(common_tensors(tensors))
    assert held[0] == held[1] == held[2]
    assert held[0]
