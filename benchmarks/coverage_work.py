"""Rows of the coverage benchmarks: one worker process each, with limits, kept in files as they come."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.coverage_extra import quick

Row = dict[str, Any]
Tell = Callable[[Row], None]
# Makes the row of a name; what it tells on the way is what remains of a row whose process is ended.
Work = Callable[[str, Tell], Row]


def chosen_names(families: list[str], only: str | None, quick_part: bool) -> list[str]:
    """Architectures of some families whose whole name matches; of the quick part those with golden numbers."""
    from benchmarks.zoo import load

    found = [n for n in load().names(*families) if not only or re.fullmatch(only, n)]
    return [n for n in quick() if n in found or not (only or families)] if quick_part else found


def run_rows(names: list[str], work: Work, jobs: int, limit: float, gigabytes: float | None = None) -> Iterator[Row]:
    """Rows in the order in which they are done.

    Parameters
    ----------
    work
        Runs in a process forked for each name, so that a crash or a hang costs one row.
    jobs
        Processes at a time.
    limit
        Seconds of the processor for one row.
    gigabytes
        Of memory for one row, beyond which allocations fail.
    """
    context = multiprocessing.get_context("fork")
    running: list[_Running] = []
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, work, gigabytes, there), daemon=True)
            process.start()
            there.close()
            running.append(_Running(name, process, here))
        multiprocessing.connection.wait([one.here for one in running], timeout=0.2)
        for one in list(running):
            row = one.row(limit)
            if row is not None:
                one.process.join(5)
                one.here.close()
                running.remove(one)
                yield row


class _Running:
    """A worker process, and what it told so far."""

    def __init__(self, name: str, process: Any, here: Any) -> None:
        self.process, self.here = process, here
        self.partial: Row = {"name": name}
        self.started = time.monotonic()

    def row(self, limit: float) -> Row | None:
        """The row, once there is one."""
        while self.here.poll():
            try:
                done, row = self.here.recv()
            except EOFError:
                self.process.join()
                return self.partial | {"failed": f"the process ended by itself, exit status {self.process.exitcode}"}
            if done:
                return dict(row)
            self.partial = row
        if _spent(self.process.pid, self.started) > limit:
            self.process.kill()
            return self.partial | {"failed": f"not done after {limit:g} seconds"}
        return None


def _spent(process: int, started: float) -> float:
    """Processor seconds of a process, so that a busy machine makes no architecture too slow; where not told, seconds."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - started
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(name: str, work: Work, gigabytes: float | None, connection: Any) -> None:
    if gigabytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    told: Row = {"name": name}

    def tell(row: Row, done: bool = False) -> None:
        nonlocal told
        told = json.loads(json.dumps(row))
        connection.send((done, told))

    try:
        row = work(name, tell)
    except Exception as error:  # noqa: BLE001  # a row says what went wrong, whatever it was
        row = told | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    tell(row, done=True)
    connection.close()


def parts_folder(json_file: Path | None, resume: bool) -> Path | None:
    """Where rows are kept: beside the file with the figures; emptied if nothing is resumed."""
    if json_file is None:
        return None
    parts = json_file.with_name(json_file.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in parts.glob("*.json"):
            old.unlink()
    return parts


def kept_rows(parts: Path | None, wanted: list[str]) -> dict[str, Row]:
    """Rows that are there."""
    files = {} if parts is None else {name: parts / f"{name}.json" for name in wanted}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def write_json(file: Path, value: Any) -> None:
    """Under another name first: a kill leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".new")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(file)
