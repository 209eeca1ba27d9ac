"""How far ARMOR's search comes in minutes on a weight of 4096 x 4096, at the paper's blocks of 128.

    python -m benchmarks.armor_time --json FILE [--minutes 10] [--size 4096] [--rates 1e-4,1e-3] [--threads 2]

What a search can gain at all is its first loss: that of NoWag-P, which no factors undercut by more than all of it. The share of
it that is gone is so a lower bound of the share of the final gain. Weight and inputs are those of `benchmarks.fit_time`: a
random matrix, and few directions that carry most of the data. Every rate runs for the given time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from recast.passes.forms import Stats
from recast.passes.forms.armor import ArmorForm


def measure(size: int, minutes: float, rate: float, console: Console) -> dict[str, Any]:
    """Search for so long; the loss as a share of the first, by seconds."""
    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    inputs = torch.randn(size // 2, size) * torch.logspace(0, -2, size)
    search, _, _ = ArmorForm(rate=rate).search(weight, Stats.from_inputs(inputs))
    first, curve = search.loss(), list[dict[str, float]]()
    start = shown = time.perf_counter()
    done, spent = 0, 0.0
    while spent < 60 * minutes:
        search.advance()
        done, spent = done + 1, time.perf_counter() - start
        if time.perf_counter() - shown > 10 or spent >= 60 * minutes:
            curve.append({"seconds": round(spent, 1), "iterations": done, "left": round(search.losses[-1] / first, 5)})
            console.log(f"rate {rate:g}: {done} iterations, {spent:.0f} s, {curve[-1]['left']:.1%} of the loss is left")
            shown = time.perf_counter()
    reached = next((point["seconds"] for point in curve if point["left"] <= 0.1), None)
    return {"rate": rate, "seconds to 90 %": reached, "iterations": done, "left": curve[-1]["left"], "curve": curve}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves there")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rates", default="1e-4,1e-3", help="step sizes of Adam; the paper's is 1e-4")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(given.size, given.minutes, float(r), Console(stderr=True)) for r in given.rates.split(",")]
    table = Table(title=f"armor_time: {given.size} x {given.size}, {given.minutes:g} minutes", title_justify="left")
    for heading in ("rate", "iterations", "loss left", "90 % gained after"):
        table.add_column(heading, justify="right")
    for row in rows:
        reached = row["seconds to 90 %"]
        told = "not reached" if reached is None else f"{reached:g} s"
        table.add_row(f"{row['rate']:g}", str(row["iterations"]), f"{row['left']:.2%}", told)
    Console(width=None if os.isatty(1) else 120).print(table)
    if given.json is not None:
        from benchmarks.harness import machine_facts

        about = {"benchmark": "armor_time", "size": given.size, "minutes": given.minutes, "threads": given.threads}
        given.json.write_text(json.dumps(about | {"machine": machine_facts(), "rows": rows}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
