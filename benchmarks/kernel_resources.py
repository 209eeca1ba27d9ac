"""Registers, spills, shared memory and instructions of every Triton kernel in every configuration, without a GPU.

    python -m benchmarks.kernel_resources --json benchmarks/results/kernel_resources.json --resume [--target sm_90] [--only REGEX]

Kernels are compiled for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942. A configuration is *clean* if nothing spills, shared
memory fits a block of the device, the matrix unit is used, and the streaming operand comes in 16 bytes a thread.
Ends with status 1 if one is not. With `--resume` only what is not in the file as its source stands is compiled: the tests hold
the file to be that of the sources, and compile a few of each target themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table


def compiled(task: tuple[int, str]) -> dict[str, Any]:
    """Compile one case of the list for one target; in a process of its own."""
    from recast.kernels.offline import cases, compile_case, digest

    index, target = task
    case = list(cases(target))[index]
    row: dict[str, Any] = {"kernel": case.kernel.rpartition(":")[2], "case": case.name, "target": target}
    row["source"] = digest(case, target)
    try:
        found = compile_case(case, target)
    except Exception as error:  # noqa: BLE001  # a row says what went wrong, whatever it was
        return row | {"failed": f"{type(error).__name__}: {str(error)[:300]}", "clean": False}
    row |= {"warps": case.num_warps, "stages": case.num_stages} | found.to_dict()
    if found.loop and case.weights:
        row["instructions per weight"] = round(found.loop / case.weights, 2)
    return row


def run(targets: list[str], only: str, processes: int, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cases whose name matches, for all targets; but those that are known are as they were."""
    from recast.kernels.offline import cases, digest

    held = {row["source"]: row for row in known if "source" in row}
    rows: list[Any] = []
    for target in targets:
        for i, case in enumerate(cases(target)):
            if re.search(only, case.name):
                rows.append(held.get(digest(case, target), (i, target)))
    tasks = [row for row in rows if isinstance(row, tuple)]
    with ProcessPoolExecutor(processes) as pool:
        made = pool.map(compiled, tasks)
        found = dict(zip(tasks, track(made, total=len(tasks), description="compiling"), strict=True))
    return [found[row] if isinstance(row, tuple) else row for row in rows]


def table(rows: list[dict[str, Any]]) -> Table:
    """What the compiler made of each."""
    made = Table(title="kernel_resources", title_justify="left")
    for heading in ("target", "kernel", "case"):
        made.add_column(heading)
    for heading in ("registers", "spilled", "shared", "matrix", "loads (bytes: number)", "instructions a weight"):
        made.add_column(heading, justify="right")
    for row in rows:
        names = (row["target"], row["kernel"].removesuffix("_kernel"), row["case"])
        if "failed" in row:
            made.add_row(*names, row["failed"].splitlines()[-1], style="red")
            continue
        matrix = ", ".join(f"{count} {name.partition('.')[0]}" for name, count in row["matrix"].items()) or "-"
        loads = ", ".join(f"{width}: {count}" for width, count in sorted(row["loads"].items()))
        made.add_row(
            *names, str(row["registers"]), str(row["spilled"]), str(row["shared"]), matrix, loads,
            str(row.get("instructions per weight", "-")), style="" if row["clean"] else "red",
        )  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90", "sm_100", "gfx942"])
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--resume", action="store_true", help="compile only what FILE does not hold as its source stands"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    from importlib.metadata import version

    known: list[dict[str, Any]] = []
    if given.resume and given.json is not None and given.json.is_file():
        kept = json.loads(given.json.read_text(encoding="utf-8"))
        known = kept["rows"] if kept["triton"] == version("triton") else []
    rows = run(given.target, given.only, given.processes, known)
    Console(width=None if sys.stdout.isatty() else 170).print(table(rows))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        partial = given.json.with_name(given.json.name + ".partial")
        about = {"benchmark": "kernel_resources", "triton": version("triton")}
        partial.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        partial.replace(given.json)
    return 0 if all(row["clean"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
