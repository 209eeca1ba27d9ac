"""Seconds and peak memory of fitting one weight, for every form, beside the same methods of other packages.

Every row runs alone in a process of its own, so that its peak memory is its own: the most that was resident during the
fit, less what was resident before it (interpreter, libraries, the weight and its statistics). `+ data` is a fit to a Gram
matrix; forms that share fit two weights. A fit that takes longer than `--limit` is stopped and says so. `--resume` keeps
the rows that are there, but for those that were stopped earlier than they would be now.

    python -m benchmarks.fit_time --json FILE [--sizes 1024x1024,4096x4096] [--only REGEX] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fit_time_page import write_page
from benchmarks.fit_time_rows import BASELINE, PEERS, held, key, texts
from benchmarks.harness import machine_facts

_STOPPED = "not done after "
SIZES = "1024x1024,4096x4096,4096x11008"


def measure(
    sizes: list[tuple[int, int]],
    wanted: list[str],
    threads: int,
    limit: float,
    target: Path | None,
    rows: list[dict[str, Any]],
    console: Console,
) -> list[dict[str, Any]]:
    """Run what is missing in `rows`, and write the file after each."""
    order = {(what, f"{m}x{n}"): i for i, ((m, n), what) in enumerate((s, w) for s in sizes for w in wanted)}
    there = {key(row) for row in rows}
    with tempfile.TemporaryDirectory(prefix="fit_time-") as folder:
        for (m, n), what in itertools.product(sizes, wanted):
            if (what, f"{m}x{n}") in there:
                continue
            row = {"name": what, "shape": [m, n]} | _run(what, m, n, threads, limit, folder)
            told = row.get("absent") or row.get("failed") or f"{row['seconds']:.2f} s"
            console.log(f"{m}x{n} {what}: {told}")
            rows.append(row)
            rows.sort(key=lambda entry: order.get(key(entry), len(order)))
            if target is not None:  # after every row: the large ones take minutes
                _write(target, rows, threads)
    return rows


def _run(what: str, m: int, n: int, threads: int, limit: float, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.fit_time_one", what, str(m), str(n), str(threads), folder]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"{_STOPPED}{limit:g} seconds"}
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def stopped_after(row: dict[str, Any]) -> float:
    """Seconds after which a fit was stopped; infinite for one that was not.

    Examples
    --------
    >>> stopped_after({"failed": "not done after 60 seconds"}), stopped_after({"seconds": 3.0})
    (60.0, inf)
    """
    told = row.get("failed", "")
    return float(told.removeprefix(_STOPPED).split()[0]) if told.startswith(_STOPPED) else math.inf


def _write(target: Path, rows: list[dict[str, Any]], threads: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {"name": "fit_time", "settings": {"threads": threads, "dtype": "float32"}, "machine": machine_facts()}
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(about | {"marks": held(rows), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def table(rows: list[dict[str, Any]]) -> Table:
    """Everything that was measured; red is slower than an SVD of the same weight."""
    made = Table(title="fit_time: one weight, float32", title_justify="left")
    for heading in ("shape", "fit"):
        made.add_column(heading)
    for heading in ("seconds", "time / svd", "peak MB", "peak / weight", "MB after", "error", "error on data"):
        made.add_column(heading, justify="right")
    bases = {key(row)[1]: row["seconds"] for row in rows if row["name"] == BASELINE and "seconds" in row}
    for i, row in enumerate(rows):
        if i and rows[i - 1]["shape"] != row["shape"]:
            made.add_section()
        name, shape = key(row)
        if why := row.get("absent") or row.get("failed"):
            made.add_row(shape, name, why, style="dim" if "absent" in row else "red")
            continue
        after = f"{row['bytes_after'] / 2**20:.1f}" if "bytes_after" in row else "-"
        errors = ["-" if row.get(k) is None else f"{row[k]:.4f}" for k in ("weight_error", "output_error")]
        ratio = row["seconds"] / bases[shape] if shape in bases else None
        peak = [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['peak_bytes'] / row['weight_bytes']:.1f}"]
        told = "-" if ratio is None else f"{ratio:.3f}"
        style = "red" if name not in PEERS and (ratio or 0) > 1 else ""
        made.add_row(shape, name, f"{row['seconds']:.3f}", told, *peak, after, *errors, style=style)
    return made


def marks_table(marks: list[dict[str, Any]]) -> Table:
    """What rows are held to."""
    made = Table(title="held to", title_justify="left")
    for heading in ("shape", "fit", "found", "at most", "met"):
        made.add_column(heading)
    for mark in marks:
        if "peak bytes" in mark:
            found, most = f"{mark['peak bytes'] / 2**20:.0f} MB at its peak", f"{mark['at most'] / 2**20:.0f} MB"
        else:
            found, most = f"{mark['seconds']:.2f} s", f"{mark['at most']:g} s"
            if "excess" in mark:
                found += f", error {mark['excess']:+.2%}"
                most += f", error +{mark['within']:.0%}"
        style = "" if mark["met"] else "red"
        made.add_row(mark["shape"], mark["row"], found, most, "yes" if mark["met"] else "no", style=style)
    return made


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--sizes", default=SIZES, help="shapes of the weights, out x in")
    parser.add_argument("--only", default="", metavar="REGEX", help="fits whose text matches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=150.0, metavar="SECONDS", help="for one fit")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the documentation there")
    given = parser.parse_args()
    sizes = [(int(m), int(n)) for m, n in (size.split("x") for size in given.sizes.split(","))]
    wanted = [text for text in [*PEERS, *texts()] if re.search(given.only, text)]
    rows = json.loads(given.json.read_text())["rows"] if given.resume and given.json and given.json.exists() else []
    again = [key(row) for row in rows if stopped_after(row) < given.limit and row["name"] in wanted]
    rows = [row for row in rows if key(row) not in again or tuple(row["shape"]) not in sizes]
    found = measure(sizes, wanted, given.threads, given.limit, given.json, rows, Console(stderr=True))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(found))
    console.print(marks_table(held(found)))
    if given.page is not None:
        write_page(given.page, found, machine_facts(), given.threads)


if __name__ == "__main__":
    main()
