"""Every architecture that transformers names as ONNX: through torch's own exporter, and through recast dense and in 8 bits.

python -m benchmarks.coverage_onnx --json benchmarks/results/coverage_onnx.json

Models are those of `benchmarks.coverage`, tiny and random. Files go through onnx's checker and shape inference; their numbers in
ONNX Runtime are held to those of the eager program, on two shapes. Rows are kept as they come (`FILE.parts/`); `--resume` goes on
with those that are missing. Writes the ONNX part of `docs/coverage.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RECAST_CACHE", "off")

import torch
from rich.console import Console

from benchmarks.coverage_extra import quick
from benchmarks.coverage_onnx_row import examine
from benchmarks.coverage_onnx_table import section, summary, totals
from benchmarks.coverage_table import ROOT, join
from benchmarks.coverage_work import Row, Tell, chosen_names, kept_rows, parts_folder, run_rows, write_json
from benchmarks.harness import machine_facts


def main(arguments: list[str] | None = None) -> int:
    """Examine the architectures, print totals, write JSON and the part of the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage_onnx", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--only", metavar="REGEX", help="architectures whose whole name matches")
    parser.add_argument(
        "--family", nargs="+", default=[], help="encoder-decoder, text, multimodal, audio, vision, other"
    )
    parser.add_argument("--quick", action="store_true", help="only the architectures with golden numbers")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="architectures at a time")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="of the processor, for one row")
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="for one row")
    parser.add_argument(
        "--sizes",
        choices=("free", "example"),
        default="free",
        help="capture for any batch and length where that goes (default), or for the example's alone: half of the time",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--again", metavar="REGEX", help="with --resume: rows to make anew all the same")
    parser.add_argument("--collect", action="store_true", help="run nothing: put together the rows that are there")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md", help="where the table goes")
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # exporters say much; what matters goes into the rows
    wanted = chosen_names(chosen.family, chosen.only, chosen.quick)
    if not wanted:
        parser.error(f"no architecture is called like {chosen.only!r}")
    again = set(chosen_names([], chosen.again, False)) if chosen.again else set()
    parts = parts_folder(chosen.json, chosen.resume or chosen.collect)
    rows = {name: row for name, row in kept_rows(parts, wanted).items() if name not in again or chosen.collect}
    left = [] if chosen.collect else [name for name in wanted if name not in rows]

    def work(name: str, tell: Tell) -> Row:
        return examine(name, tell, chosen.sizes, chosen.limit)

    if left:
        _share_operations()
        examine("bert", lambda row: None, "example")  # imports once what every process needs
    left.sort(key=_turn)
    for row in run_rows(left, work, chosen.jobs, chosen.limit, chosen.memory):
        rows[row["name"]] = row
        if parts is not None:
            write_json(parts / f"{row['name']}.json", row)
        print(f"{len(rows)}/{len(wanted)} {summary(row)}", file=sys.stderr, flush=True)
    ordered = [rows.get(name, {"name": name, "unseen": "not run"}) for name in wanted]
    whole = totals(ordered)
    Console(width=130).print_json(json.dumps(whole))
    if chosen.json is not None:
        facts = machine_facts()
        write_json(chosen.json, {"benchmark": "coverage_onnx", "machine": facts, "totals": whole, "rows": ordered})
        join(chosen.page, section(ordered, whole, facts["libraries"]))
    return 0


def _turn(name: str) -> tuple[bool, str]:
    """The quick part first, then the others in a shuffled order that is always the same."""
    return name not in quick(), hashlib.blake2b(name.encode()).hexdigest()


def _share_operations() -> None:
    """Let all exports, torch's too, read onnxscript's operations once: it would be half of the time for a small model."""
    with contextlib.suppress(ImportError, AttributeError):
        from onnxscript._framework_apis import torch_2_5

        torch_2_5.get_torchlib_ops = functools.cache(torch_2_5.get_torchlib_ops)


if __name__ == "__main__":
    sys.exit(main())
