"""Long searches that are interrupted go on where they were, to the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms import armor_fit
from recast.passes.forms.armor_adam import AdamSearch
from recast.passes.forms.armor_alternating import AlternatingSearch
from recast.passes.forms.armor_fit import ArmorFactors, ArmorSearch
from recast.passes.unfinished import Unfinished, kept_in, read_whole, unfinished, write_whole

FORM = "armor(block=8, iterations=30, rate=0.01, search='adam')"


@pytest.fixture(autouse=True)
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(armor_fit, "SAVE_EVERY", -1.0)


KINDS: list[type[ArmorSearch]] = [AdamSearch, AlternatingSearch]


def search(seed: int = 0, kind: type[ArmorSearch] = AdamSearch) -> ArmorSearch:
    made = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=made)
    mask = torch.tensor([True, True, False, False]).repeat(16, 6)
    eye = torch.eye(8)
    factors = ArmorFactors(eye.repeat(2, 1, 1), torch.where(mask, target, 0), mask, eye.repeat(3, 1, 1))
    return kind(target, torch.rand(24, generator=made), factors, 24, rate=0.01, greedy=False, seed=seed)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Steps from now on are counted, and the one after so many is the user's Ctrl-C."""
    steps: list[int] = []
    advance = ArmorSearch.advance

    def counted(self: ArmorSearch) -> float:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return advance(self)

    monkeypatch.setattr(ArmorSearch, "advance", counted)
    return steps


def alike(one: ArmorFactors, other: ArmorFactors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [1, 20, 29])
def test_an_interrupted_search_gives_what_it_would_have_given(
    after: int, kind: type[ArmorSearch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlternatingSearch, "patience", 1000)
    whole = search(kind=kind)
    expected = whole.run(40, progress=False)
    with monkeypatch.context() as patched:
        interrupt(patched, after)
        with pytest.raises(KeyboardInterrupt), kept_in(tmp_path / "states"):
            search(kind=kind).run(40, progress=False)
    again = search(kind=kind)
    with monkeypatch.context() as patched, kept_in(tmp_path / "states"):
        steps = interrupt(patched, 1000)
        found = again.run(40, progress=False)
    assert len(steps) == len(whole.losses) - after
    assert alike(found, expected)
    assert again.losses == whole.losses
    assert again.gains == whole.gains
    assert not (tmp_path / "states").exists()


def test_another_search_does_not_take_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 9)
        with pytest.raises(KeyboardInterrupt), kept_in(tmp_path):
            search().run(30, progress=False)
    with kept_in(tmp_path):
        found = search(seed=1).run(30, progress=False)
    assert alike(found, search(seed=1).run(30, progress=False))


def planned(model: nn.Module, x: Tensor, cache: OperatorCache) -> Any:
    program = recast.capture(model, (x,))
    statistics = recast.calibrate(program, [x], progress=False)
    recipe = {"rules": [{"match": "*", "form": FORM}], "allow_larger": True}
    return recast.plan(program, recipe, statistics, cache=cache, progress=False)


def test_an_interrupted_plan_goes_on_within_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16, bias=False)).eval(), torch.randn(40, 24)
    whole = OperatorCache(tmp_path / "whole")
    planned(model, x, whole)
    with monkeypatch.context() as patched:
        interrupt(patched, 40)  # with data there are two searches, and this is in the second
        with pytest.raises(KeyboardInterrupt):
            planned(model, x, OperatorCache(tmp_path / "cut"))
    states = list((tmp_path / "cut" / "unfinished").rglob("*.safetensors"))
    assert len(states) == 2
    with monkeypatch.context() as patched:
        steps = interrupt(patched, 1000)
        again = OperatorCache(tmp_path / "cut")
        planned(model, x, again)
    assert len(steps) == 60 - 40
    (one,), (other,) = whole.memory.values(), again.memory.values()
    assert torch.equal(one[0].operator.to_dense(), other[0].operator.to_dense())
    assert one[0].predicted_error == other[0].predicted_error
    assert not list((tmp_path / "cut" / "unfinished").rglob("*.safetensors"))


def test_a_damaged_state_is_none(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path)
    kept.save("one", {"t": torch.arange(6)}, {"done": 3})
    held = kept.load("one")
    assert held is not None
    assert held[0]["t"].tolist() == list(range(6))
    assert held[1] == {"done": 3}
    file = tmp_path / "one.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert kept.load("one") is None
    file.write_bytes(b"cut")
    assert kept.load("one") is None
    assert kept.load("two") is None


def test_what_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    write_whole(tmp_path / "file" / "below.safetensors", {"t": torch.ones(2)}, {})
    assert read_whole(tmp_path / "file" / "below.safetensors") is None


def test_nothing_is_kept_outside() -> None:
    assert unfinished() is None
    with kept_in(None):
        assert unfinished() is None
