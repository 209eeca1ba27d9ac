"""What recast recognises in every architecture that transformers names, against what the model did when it ran.

python -m benchmarks.coverage --json benchmarks/results/coverage.json

Models are tiny and random (`tests/zoo`); what is there to recognise comes from watching the eager run (`tests/zoo/truth.py`),
not from the patterns. Every architecture has a process of its own with a time limit, so that a crash or a hang costs one row.
Rows are kept as they come (`FILE.parts/`); `--resume` goes on with those that are missing. Writes `docs/coverage.md`, the table
to look an architecture up in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RECAST_CACHE", "off")

import torch
from rich.console import Console

from benchmarks.coverage_extra import quick, second_leg
from benchmarks.coverage_row import compare_again, examine
from benchmarks.coverage_table import summary, totals, write_page
from benchmarks.harness import machine_facts

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Examine all architectures, print totals, write JSON and the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--only", metavar="REGEX", help="architectures whose whole name matches")
    parser.add_argument(
        "--family", nargs="+", default=[], help="encoder-decoder, text, multimodal, audio, vision, other"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="architectures at a time")
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="for one architecture")
    parser.add_argument(
        "--sizes",
        choices=("free", "example"),
        default="free",
        help="capture for any batch and length (default), or for the example's alone: what is recognised is the same in nearly "
        "all, the time a tenth; to compare raised programs each is then captured again for every size compared at",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--quick", action="store_true", help="only the architectures with golden numbers")
    parser.add_argument(
        "--extra", action="store_true", help="the quick part, on the oldest supported torch and transformers"
    )
    parser.add_argument(
        "--torch",
        default="oldest",
        metavar="VERSION",
        help="with --extra: its version, or 'here' for the one installed",
    )
    parser.add_argument("--environment", type=Path, metavar="DIR", help="with --extra: where to make or find it")
    parser.add_argument("--collect", action="store_true", help="run nothing: put together the rows that are there")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md", help="where the table goes")
    chosen = parser.parse_args(arguments)
    if chosen.extra:
        return second_leg(chosen.torch, chosen.environment, chosen.json)

    from benchmarks.zoo import load

    zoo = load()
    torch.set_num_threads(1)
    wanted = [n for n in zoo.names(*chosen.family) if not chosen.only or re.fullmatch(chosen.only, n)]
    if chosen.quick:
        wanted = [n for n in quick() if n in wanted or not chosen.only]
    if not wanted:
        parser.error(f"no architecture is called like {chosen.only!r}")
    parts = _folder(chosen.json, chosen.resume or chosen.collect)
    rows = _kept(parts, wanted)
    left = [name for name in wanted if _unfinished(rows.get(name)) and not chosen.collect]
    if left:
        _warm_up()
    for row in _examined(left, rows, chosen.sizes, chosen.jobs, chosen.limit):
        if "failed" in row and row["name"] in rows:  # what was recognised stands; only the comparison is missing
            rows[row["name"]] |= {"compared": [], "not_compared": {"any size": row["failed"]}}
            row = rows[row["name"]]
        rows[row["name"]] = row
        if parts is not None:
            _write(parts / f"{row['name']}.json", row)
        print(f"{len(rows)}/{len(wanted)} {summary(row)}", file=sys.stderr, flush=True)
    ordered = [rows.get(name, {"name": name, "unseen": "not examined in this run"}) for name in wanted]
    whole = totals(ordered)
    Console(width=130).print_json(json.dumps(whole))
    if chosen.json is not None:
        result = {"benchmark": "coverage", "machine": machine_facts(), "totals": whole, "rows": ordered}
        _write(chosen.json, result)
        write_page(chosen.page, ordered, whole, machine_facts()["libraries"])
    return 0


def _unfinished(row: dict[str, Any] | None) -> bool:
    """Whether a row is missing, or was written before raised programs were compared at every size."""
    return row is None or bool(row.get("captured") and "compared" not in row)


def _warm_up() -> None:
    """Import once what every child process needs."""
    examine("llama", "example")


def _examined(names: list[str], kept: dict[str, dict[str, Any]], sizes: str, jobs: int, limit: float) -> Any:
    context = multiprocessing.get_context("fork")
    running: list[tuple[str, Any, Any, float]] = []
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, kept.get(name), sizes, there), daemon=True)
            process.start()
            there.close()
            running.append((name, process, here, time.monotonic()))
        multiprocessing.connection.wait([here for _, _, here, _ in running], timeout=0.2)
        for entry in list(running):
            name, process, here, started = entry
            row = None
            if here.poll():
                try:
                    row = here.recv()
                except EOFError:
                    process.join()
                    row = {"name": name, "failed": f"the process ended by itself, exit status {process.exitcode}"}
            elif _spent(process.pid, started) > limit:
                process.kill()
                row = {"name": name, "failed": f"not done after {limit:g} seconds"}
            if row is not None:
                process.join(5)
                here.close()
                running.remove(entry)
                yield row


def _spent(process: int, started: float) -> float:
    """Processor seconds of a process, so that a busy machine makes no architecture too slow; where not told, seconds."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - started
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(name: str, kept: dict[str, Any] | None, sizes: str, connection: Any) -> None:
    try:
        row = examine(name, sizes) if kept is None else compare_again(kept)
    except Exception as error:  # noqa: BLE001  # a row says what went wrong, whatever it was
        row = {"name": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
    connection.send(json.loads(json.dumps(row)))
    connection.close()


def _folder(json_file: Path | None, resume: bool) -> Path | None:
    if json_file is None:
        return None
    parts = json_file.with_name(json_file.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in parts.glob("*.json"):
            old.unlink()
    return parts


def _kept(parts: Path | None, wanted: list[str]) -> dict[str, dict[str, Any]]:
    files = {} if parts is None else {name: parts / f"{name}.json" for name in wanted}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def _write(file: Path, value: Any) -> None:
    """Under another name first: a kill leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".new")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(file)


if __name__ == "__main__":
    sys.exit(main())
