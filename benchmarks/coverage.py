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
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RECAST_CACHE", "off")

import torch
from rich.console import Console

from benchmarks.coverage_extra import second_leg
from benchmarks.coverage_row import compare_again, examine
from benchmarks.coverage_table import ROOT, summary, totals, write_page
from benchmarks.coverage_work import Row, Tell, chosen_names, kept_rows, parts_folder, run_rows, write_json
from benchmarks.harness import machine_facts


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

    torch.set_num_threads(1)
    wanted = chosen_names(chosen.family, chosen.only, chosen.quick)
    if not wanted:
        parser.error(f"no architecture is called like {chosen.only!r}")
    parts = parts_folder(chosen.json, chosen.resume or chosen.collect)
    rows = kept_rows(parts, wanted)
    left = [name for name in wanted if _unfinished(rows.get(name)) and not chosen.collect]
    if left:
        _warm_up()

    def work(name: str, tell: Tell) -> Row:
        return examine(name, chosen.sizes) if name not in rows else compare_again(rows[name])

    for row in run_rows(left, work, chosen.jobs, chosen.limit):
        if "failed" in row and row["name"] in rows:  # what was recognised stands; only the comparison is missing
            rows[row["name"]] |= {"compared": [], "not_compared": {"any size": row["failed"]}}
            row = rows[row["name"]]
        rows[row["name"]] = row
        if parts is not None:
            write_json(parts / f"{row['name']}.json", row)
        print(f"{len(rows)}/{len(wanted)} {summary(row)}", file=sys.stderr, flush=True)
    ordered = [rows.get(name, {"name": name, "unseen": "not examined in this run"}) for name in wanted]
    whole = totals(ordered)
    Console(width=130).print_json(json.dumps(whole))
    if chosen.json is not None:
        result = {"benchmark": "coverage", "machine": machine_facts(), "totals": whole, "rows": ordered}
        write_json(chosen.json, result)
        write_page(chosen.page, ordered, whole, machine_facts()["libraries"])
    return 0


def _unfinished(row: dict[str, Any] | None) -> bool:
    """Whether a row is missing, or was written before raised programs were compared at every size."""
    return row is None or bool(row.get("captured") and "compared" not in row)


def _warm_up() -> None:
    """Import once what every child process needs."""
    examine("llama", "example")


if __name__ == "__main__":
    sys.exit(main())
