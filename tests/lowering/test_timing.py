"""From how many tokens on another way is faster: measured once, kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recast.lowering import timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_known", {})
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path))


def times(monkeypatch: pytest.MonkeyPatch, few: dict[int, float], many: float) -> list[int]:
    """Tokens that were timed, of two ways whose times are given."""
    asked: list[int] = []

    def medians(runs: object, device: object, *, rounds: int) -> list[float]:
        return [few[asked[-1]], many]

    monkeypatch.setattr(timing, "medians", medians)
    return asked


def most(asked: list[int], *about: object) -> int:
    def ways(tokens: int) -> tuple[object, object]:
        asked.append(tokens)
        return (lambda: None), (lambda: None)

    return timing.most_tokens(ways, CPU, *about, among=(4, 8, 16))  # type: ignore[arg-type]


def test_the_search_ends_where_the_other_way_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = times(monkeypatch, {4: 1.0, 8: 3.0, 16: 9.0}, 2.0)
    assert most(asked, "a") == 4
    assert asked == [4, 8]
    assert most(asked, "a") == 4  # known
    assert asked == [4, 8]
    (file,) = (tmp_path / "times").iterdir()
    assert json.loads(file.read_text())["most"] == 4
    timing._known.clear()
    assert most(asked, "a") == 4  # read
    assert asked == [4, 8]


def test_ends_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most(times(monkeypatch, dict.fromkeys((4, 8, 16), 1.0), 2.0), "always") == 16
    assert most(times(monkeypatch, dict.fromkeys((4, 8, 16), 3.0), 2.0), "never") == 0


def test_nothing_is_kept_where_the_cache_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECAST_CACHE", "off")
    asked = times(monkeypatch, {4: 1.0, 8: 3.0, 16: 9.0}, 2.0)
    assert most(asked, "b") == most(asked, "b") == 4
    assert asked == [4, 8]
    assert not (tmp_path / "times").exists()
