"""Times of code on this machine: medians over rounds in which all take turns, kept on disk; and from where on one way is faster."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import recast.kernels
from recast.kernels.kept import cache_directory

__all__ = ["medians", "most_tokens", "read_times", "times_file", "write_times"]

_ROUNDS, _SAMPLE = 11, 2e-3
_known: dict[tuple[Any, ...], int] = {}


def medians(runs: Sequence[Callable[[], object]], device: torch.device, *, rounds: int = _ROUNDS) -> list[float]:
    """Time several ways, taking turns, each sample long enough for the clock.

    Parameters
    ----------
    runs
        Called a few times first, so that what compiles or allocates has done so.
    device
        Whose work is waited for.
    rounds
        Samples of each.

    Returns
    -------
    list of float
        Median seconds of a call of each.

    Examples
    --------
    >>> short, long = medians([lambda: None, lambda: time.sleep(0.002)], torch.device("cpu"), rounds=3)
    >>> short < long
    True
    """

    def seconds(run: Callable[[], object], times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / times

    for run in runs:
        seconds(run, 3)
    times = [max(1, round(_SAMPLE / max(seconds(run, 2), 1e-7))) for run in runs]
    samples = [[seconds(run, count) for run, count in zip(runs, times, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def most_tokens(
    ways: Callable[[int], tuple[Callable[[], object], Callable[[], object]]],
    device: torch.device,
    *about: Any,
    among: Sequence[int] = (4, 8, 16, 32, 64, 128),
) -> int:
    """Return the most tokens for which the first of two ways is the faster: measured once, kept in memory and on disk.

    Parameters
    ----------
    ways
        Gives both for a number of tokens.
    device
        Where they run.
    about
        What else the times depend on: shapes, number formats.
    among
        Numbers of tokens to try, ascending; the first at which the second way wins ends the search. 0 if that is the first.
    """
    key = (str(device), torch.get_num_threads(), *about, *among)
    if key in _known:
        return _known[key]
    file = times_file(device, "most tokens", *about, *among)
    kept = None if file is None else read_times(file)
    if kept is not None:
        _known[key] = int(kept["most"])
        return _known[key]
    found, told = 0, {}
    for tokens in among:
        few, many = medians(ways(tokens), device, rounds=5)
        told[tokens] = (few, many)
        if many < few:
            break
        found = tokens
    if file is not None:
        write_times(file, {"most": found, "seconds": told})
    _known[key] = found
    return found


def times_file(device: torch.device, *about: Any) -> Path | None:
    """Where times of something on this machine are kept; None where nothing is."""
    folder = cache_directory()
    if folder is None:
        return None
    machine: list[Any] = [platform.node(), platform.processor(), torch.__version__, torch.get_num_threads()]
    if device.type == "cuda":
        machine += [torch.cuda.get_device_name(device), torch.version.cuda]
    words = repr([*about, machine, _source()])
    return folder / "times" / f"{hashlib.sha256(words.encode()).hexdigest()}.json"


def read_times(file: Path) -> dict[str, Any] | None:
    """What was kept there, if anything."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_times(file: Path, times: dict[str, Any]) -> None:
    """Keep times, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps(times), encoding="utf-8")
    unfinished.replace(file)


@functools.cache
def _source() -> str:
    """Of the kernels: other code, other times."""
    folder = Path(next(iter(recast.kernels.__path__)))
    files = sorted([*folder.rglob("*.py"), *folder.rglob("*.[ch]")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
