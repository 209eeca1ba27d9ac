"""Seconds and peak memory of fitting one weight, beside `torch.linalg.svd` of it.

Every row runs alone in a process of its own, so that its peak memory is its own: the most that was resident during the
fit, less what was resident before it (interpreter, libraries and the weight). `+ data` is a fit to a Gram matrix.

    python -m benchmarks.fit_time --json FILE [--sizes 1024x1024,4096x4096] [--threads 2]
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SIZES = "1024x1024,4096x4096,4096x11008"
FITS = ["low_rank(ratio=0.5)", "low_rank(ratio=0.5) + data", "int4", "int4 + data", "int8"]
BASELINE = "torch.linalg.svd"
PAGE = 4096


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def run_one(what: str, m: int, n: int, threads: int) -> dict[str, Any]:
    """Fit once in this process, sampling memory from a second thread."""
    import torch

    from recast.passes.forms import Form, Stats, forms, relative_error

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    forms()
    text, data, _ = what.partition(" + data")
    weight = torch.randn(m, n) / n**0.5
    # Few directions carry most of the data, as in a network; half as many tokens as features is a hard case.
    scales = torch.logspace(0, -2, n)
    stats = None
    if data:
        stats = Stats.from_inputs(torch.randn(n // 2, n) * scales)
    # What the first call alone pays (thread pools, imports of scipy) is no part of it.
    small = torch.randn(256, 256)
    torch.linalg.svd(small, full_matrices=False)
    if what != BASELINE:
        Form.parse(text).fit(small)
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if what == BASELINE:
        operator = None
        torch.linalg.svd(weight, full_matrices=False)
    else:
        operator = Form.parse(text).fit(weight, stats)
    seconds = time.perf_counter() - start
    peak = max(peak, resident())
    done.set()
    watcher.join()
    found: dict[str, Any] = {"seconds": seconds, "peak_bytes": max(0, peak - before), "weight_bytes": weight.nbytes}
    if operator is not None:
        error, output = relative_error(weight, operator, stats)
        found |= {"bytes_after": operator.nbytes, "weight_error": error, "output_error": output}
    return found


def measure(sizes: list[tuple[int, int]], threads: int, target: Path | None, console: Console) -> list[dict[str, Any]]:
    from benchmarks.harness import machine_facts

    rows: list[dict[str, Any]] = []
    for m, n in sizes:
        for what in [BASELINE, *FITS]:
            console.log(f"{m}x{n} {what}")
            command = [sys.executable, "-m", "benchmarks.fit_time", "--one", what, "--sizes", f"{m}x{n}"]
            ended = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"name": what, "shape": [m, n]}
            if ended.returncode:
                row["failed"] = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
            else:
                row |= json.loads(ended.stdout.splitlines()[-1])
            base = next(r for r in [*rows, row] if r["name"] == BASELINE and r["shape"] == [m, n])
            if "seconds" in row and "seconds" in base:
                row["ratio_to_svd"] = row["seconds"] / base["seconds"]
            rows.append(row)
            if target is not None:  # after every row: the large ones take minutes
                target.parent.mkdir(parents=True, exist_ok=True)
                about = {"name": "fit_time", "settings": {"threads": threads, "dtype": "float32"}}
                partial = target.with_name(target.name + ".partial")
                partial.write_text(
                    json.dumps(about | {"machine": machine_facts(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
                )
                partial.replace(target)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="fit_time: one weight, float32", title_justify="left")
    for heading in ("shape", "fit"):
        made.add_column(heading)
    for heading in ("seconds", "time / svd", "peak MB", "weight MB", "MB after", "error", "error on data"):
        made.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        if i and rows[i - 1]["shape"] != row["shape"]:
            made.add_section()
        cells = [f"{row['shape'][0]}x{row['shape'][1]}", row["name"]]
        if "failed" in row:
            made.add_row(*cells, "failed", row["failed"], style="red")
            continue
        megabytes = [
            f"{row[k] / 2**20:.0f}" if k in row else "-" for k in ("peak_bytes", "weight_bytes", "bytes_after")
        ]
        errors = ["-" if row.get(k) is None else f"{row[k]:.4f}" for k in ("weight_error", "output_error")]
        ratio = f"{row['ratio_to_svd']:.2f}" if "ratio_to_svd" in row else "-"
        slow = row["name"] != BASELINE and row.get("ratio_to_svd", 0) > 1
        made.add_row(*cells, f"{row['seconds']:.2f}", ratio, *megabytes, *errors, style="red" if slow else "")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--sizes", default=SIZES, help="shapes of the weights, out x in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = [(int(m), int(n)) for m, n in (size.split("x") for size in given.sizes.split(","))]
    if given.one:
        print(json.dumps(run_one(given.one, *sizes[0], given.threads)))
        return
    console = Console(stderr=True)
    Console(width=None if sys.stdout.isatty() else 140).print(table(measure(sizes, given.threads, given.json, console)))


if __name__ == "__main__":
    main()
