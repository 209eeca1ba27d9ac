"""What every weight form costs in fidelity, at equal bytes, on trained models.

    python -m benchmarks.fidelity --json benchmarks/results/fidelity.json

Models: `llama` and its mixture-of-experts sister `mixtral`, both trained by `benchmarks.language_model`, and `minilm`, the
sentence encoder of the demo. Every form is fitted to the matrices as they are at 16 bits, with the largest setting that a number of
bytes allows (100, 75, 50, 37.5, 25 and 12.5 % of 16 bits; where low rank is published, 90 to 60 %), and then runs in
float32 in the rewritten program. Fits see training text, all figures are of text that was held out.

Every row has a process of its own and is kept as it comes (`FILE.parts/`); `--resume` goes on with those that are missing.
Prints the rows, the published orders and whether they hold, draws `docs/fidelity.svg`, and with `--page` writes a page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RECAST_CACHE", "off")

import torch
from rich.console import Console

from benchmarks.fidelity_budget import HALF, Family, choices
from benchmarks.fidelity_forms import FAMILIES, stage
from benchmarks.fidelity_orders import check_orders, orders_table
from benchmarks.fidelity_page import write_page
from benchmarks.fidelity_picture import draw
from benchmarks.fidelity_rows import key_of, rows_table
from benchmarks.harness import machine_facts

if TYPE_CHECKING:
    from benchmarks.fidelity_models import Subject

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("llama", "minilm", "mixtral")
QUICK = ("dense", "svd", "low_rank", "int4 nearest", "int4 gptq")


@dataclass(frozen=True)
class Task:
    """One row to be measured."""

    model: str
    family: Family
    text: str
    budget: float | str | None

    @property
    def row(self) -> dict[str, Any]:
        """What is known beforehand."""
        family = self.family
        return {
            "model": self.model,
            "form": family.name,
            "kind": family.kind,
            "text": self.text,
            "budget": self.budget,
            "scope": family.scope,
            "data": family.data,
        }

    @property
    def file(self) -> str:
        """Name of the file that keeps the row."""
        return re.sub(r"[^\w.%]+", "-", "--".join(str(part) for part in key_of(self.row))) + ".json"


def measure(subject: Subject, task: Task) -> dict[str, Any]:
    """Fit a form to every matrix in its scope, run the rewritten model on held-out text, and count."""
    import recast
    from benchmarks.fidelity_models import HalfCache

    row = task.row
    shapes = subject.shapes(task.family.scope)
    dense = HALF.itemsize * sum(m * n for m, n in shapes.values())
    if task.text == "dense":
        return row | {"bytes": dense, "share": 1.0, "facts": subject.facts} | subject.judge(subject.program)
    cache = HalfCache()
    every = "|".join(re.escape(name) for name in shapes)
    match = {"match": "*", "kind": task.family.block} if task.family.block else {"match": f"re:(?:{every})"}
    recipe = {"rules": [match | {"form": task.text}], "allow_larger": True}
    data = subject.calibration if task.family.data else None
    options: dict[str, Any] = {"cache": cache, "progress": False}
    if task.family.ordered:
        data = recast.calibrate(subject.program, subject.batches, recipe=recipe, **options)
    plan = recast.plan(subject.program, recipe, data, **options)
    changed = recast.rewrite(subject.program, plan, verification=False, measure=False, pictures=False, **options)
    held, layers = sum(cache.bytes.values()), list[float]()
    if task.family.block:  # plain matrices in the program's own float32
        held, before = (
            sum(getattr(e, name) for e in plan.entries.values()) // 2 for name in ("bytes_after", "bytes_before")
        )
        if before != dense:
            raise ValueError(f"blocks of {before} bytes were rewritten, {dense} are compared: {plan.skipped}")
    else:
        stats = {name: subject.held_out.of(name) for name in shapes if name in subject.held_out}
        layers = list(cache.layer_errors(stats, subject.matrices).values())
    seen = [entry.predicted_error for entry in plan.entries.values()]
    row |= {
        "bytes": held,
        "share": round(held / dense, 5),
        "matrices": len(shapes),
        "fit_seconds": round(cache.seconds, 3) if not task.family.block else None,
        "layer_error": round(sum(layers) / len(layers), 6) if layers else None,
        "worst_layer_error": round(max(layers), 6) if layers else None,
        "layer_error_on_calibration": round(sum(seen) / len(seen), 6) if data is not None else None,
    }
    start = time.perf_counter()
    row |= {name: round(value, 6) for name, value in subject.judge(changed).items()}
    return row | {"judge_seconds": round(time.perf_counter() - start, 2)}


def tasks_of(subject: Subject, only: str | None, quick: bool) -> list[Task]:
    """The rows of one model, in the order in which they are measured."""
    found = []
    for family in sorted(FAMILIES, key=stage):
        if not subject.shapes(family.scope):
            continue
        if quick and family.name not in QUICK:
            continue
        if only and not re.search(only, family.name):
            continue
        for text, budget in choices(family, subject.shapes(family.scope)):
            if not quick or budget in (None, 0.5):
                found.append(Task(subject.name, family, text, budget))
    return found


def measured(subject: Subject, tasks: list[Task], limit: float) -> Iterator[dict[str, Any]]:
    """Measure one row after another, each in a process that starts with the model as it stands here."""
    context = multiprocessing.get_context("fork")
    for task in tasks:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(subject, task, there), daemon=True)
        process.start()
        there.close()
        if not wait([here], timeout=limit):
            process.kill()
            yield task.row | {"failed": f"not done after {limit:g} seconds"}
        else:
            try:
                yield here.recv()
            except EOFError:
                process.join()
                yield task.row | {"failed": f"the process ended by itself, exit status {process.exitcode}"}
        process.join(5)
        here.close()


def _child(subject: Subject, task: Task, connection: Any) -> None:
    try:
        row = measure(subject, task)
    except Exception as error:  # noqa: BLE001  # a row says what went wrong, whatever it was
        row = task.row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    connection.send(json.loads(json.dumps(row)))
    connection.close()


def run(
    names: list[str], parts: Path | None, kept: dict[Any, dict[str, Any]], options: Any
) -> dict[Any, dict[str, Any]]:
    """Measure what is missing; returns all rows by key."""
    from benchmarks.fidelity_models import prepare

    rows = dict(kept)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for name in names:
        subject = prepare(name, quick=options.quick, log=log)
        tasks = tasks_of(subject, options.only, options.quick)
        left = [task for task in tasks if not _done(rows.get(key_of(task.row)), task)]
        log(f"{name}: {subject.facts}; {len(tasks)} rows, {len(left)} to measure")
        for i, row in enumerate(measured(subject, left, options.limit)):
            rows[key_of(row)] = row
            if parts is not None:
                write(parts / left[i].file, row)
            figure = row.get("failed") or f"{row['share']:.1%} of the bytes, " + ", ".join(
                f"{key} {row[key]:.4f}"
                for key in ("perplexity", "cosine", "layer_error", "fit_seconds")
                if row.get(key) is not None
            )
            log(f"{name} {i + 1}/{len(left)} {row['form']} [{row['text']}]: {figure}")
    return rows


def _done(row: dict[str, Any] | None, task: Task) -> bool:
    """Whether a row of an earlier run still stands; one that failed is tried again."""
    return row is not None and row["text"] == task.text and "failed" not in row


def kept_rows(file: Path | None, parts: Path | None) -> dict[Any, dict[str, Any]]:
    """Rows of an earlier run: of the file, and above them those that were kept one by one."""
    found = list[dict[str, Any]]()
    if file is not None and file.is_file():
        found += json.loads(file.read_text(encoding="utf-8"))["rows"]
    if parts is not None and parts.is_dir():
        found += [json.loads(part.read_text(encoding="utf-8")) for part in sorted(parts.glob("*.json"))]
    return {key_of(row): row for row in found}


def write(file: Path, value: Any) -> None:
    """Under another name first: a kill leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".new")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--model", nargs="+", choices=NAMES, default=list(NAMES), help="which of the models")
    parser.add_argument("--only", metavar="REGEX", help="forms in whose name (first column) this is found")
    parser.add_argument(
        "--quick", action="store_true", help="five forms on an eighth of the text: a look, not a measurement"
    )
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="for one row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--collect", action="store_true", help="run nothing: put together the rows that are there")
    parser.add_argument(
        "--picture", type=Path, default=ROOT / "docs" / "fidelity.svg", help="where it is drawn, with --json"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables there: docs/fidelity.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = None if chosen.json is None else chosen.json.with_name(chosen.json.name + ".parts")
    kept = kept_rows(chosen.json, parts) if chosen.resume or chosen.collect else {}
    if parts is not None and not (chosen.resume or chosen.collect):
        for old in parts.glob("*.json"):
            old.unlink()
    found = kept if chosen.collect else run(chosen.model, parts, kept, chosen)
    order = {family.name: i for i, family in enumerate(FAMILIES)}
    rows = sorted(found.values(), key=lambda row: (NAMES.index(row["model"]), order.get(row["form"], -1)))
    orders = check_orders(rows)
    console = Console(width=None if os.isatty(1) else 150)
    for name in dict.fromkeys(row["model"] for row in rows):
        console.print(rows_table([row for row in rows if row["model"] == name], name))
    console.print(orders_table(orders))
    if chosen.json is not None:
        result = {"benchmark": "fidelity", "machine": machine_facts(), "orders": orders, "rows": rows}
        write(chosen.json, result)
        if any(row["model"] == "llama" and row["form"] == "dense" for row in rows) and not chosen.quick:
            chosen.picture.write_text(draw([row for row in rows if row["model"] == "llama"]), encoding="utf-8")
        if chosen.page is not None:
            write_page(chosen.page, rows, orders, machine_facts()["libraries"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
