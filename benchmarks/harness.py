"""Interleaved timing of named contestants in one process.

Machines drift: clocks change, neighbours come and go. So nobody is timed in a block of their own. Every round runs
every contestant once, in an order that rotates by one each round, and ratios are taken within a round before their
median is. A turn is: a pause (the spinning threads of the contestant before must have gone to sleep), one call that is
not timed (its weights come back into the caches, its threads wake up), one call that is.
Whoever is several times slower than the baseline runs in the first rounds only; the others would wait for nothing.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIBRARIES = ("torch", "numpy", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "recast")
X86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PATIENCE, HOPELESS = 2, 4  # who is more than 4 times slower than the baseline runs in 2 rounds
ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass
class Ready:
    """A contestant that has loaded, converted, compiled: what `prepare` returns."""

    run: Callable[[Any], Any]  # the same inputs for all; returns what fidelity is taken of
    bytes: int | None = None  # of the files this contestant needs at run time
    note: str = ""


@dataclass
class Contestant:
    """Somebody to be timed. `prepare` is called once and takes as long as it likes; only `Ready.run` is timed."""

    name: str
    prepare: Callable[[], Ready]
    target: str = ""  # eager, inductor, onnx, openvino
    group: str = "peer"  # peer, recast or floor
    requires: tuple[str, ...] = ()  # modules without which the row says "not installed"
    against: tuple[str, ...] = ()  # peers: this row is held to the fastest of them


@dataclass
class Row:
    """What was measured of one contestant; `absent` is why nothing was."""

    name: str
    target: str
    group: str
    bytes: int | None = None
    note: str = ""
    fidelity: dict[str, float] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    absent: str = ""
    prepare_seconds: float = 0.0
    samples: list[float] = field(default_factory=list)  # milliseconds, one a round, from the first round on

    def quartiles(self) -> tuple[float, float, float]:
        return _quartiles(self.samples)

    def ratios(self, other: Row) -> tuple[float, float, float]:
        """Quartiles of this row's time over the other's, each ratio within one round; below 1 is faster."""
        return _quartiles([a / b for a, b in zip(self.samples, other.samples, strict=False)])


@dataclass
class Result:
    """All rows, the one that ratios are relative to, and where and how they came about."""

    name: str
    baseline: str
    settings: dict[str, Any]
    rows: list[Row]
    machine: dict[str, Any]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name and row.samples), None)

    def peer(self, row: Row) -> Row | None:
        """The fastest of the peers this row is held to, of those that ran."""
        ran = [found for name in row.against if (found := self.row(name))]
        return min(ran, key=lambda found: found.quartiles()[1], default=None)

    def verdict(self, row: Row) -> str:
        """How the row compares with its fastest peer; worse is said as plainly as better."""
        peer = self.peer(row)
        if peer is None or not row.samples:
            return ""
        low, middle, high = row.ratios(peer)
        speed = "slower than" if low > 1 else "faster than" if high < 1 else "level with"
        worse = [k for k, v in row.fidelity.items() if v < peer.fidelity.get(k, v) - 5e-4]
        return f"{speed} {peer.name} ({middle:.2f}x)" + (f", less faithful ({', '.join(worse)})" if worse else "")

    def to_dict(self) -> dict[str, Any]:
        base = self.row(self.baseline)
        rows = []
        for row in self.rows:
            about = {"name": row.name, "target": row.target, "group": row.group}
            if not row.samples:
                rows.append(about | {"absent": row.absent})
                continue
            low, middle, high = row.quartiles()
            entry: dict[str, Any] = about | {
                "bytes": row.bytes,
                "milliseconds": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "fastest": round(min(row.samples), 3),
                "fidelity": {k: round(v, 6) for k, v in row.fidelity.items()},
                "prepare_seconds": round(row.prepare_seconds, 2),
                "rounds": len(row.samples),
                "samples": [round(s, 3) for s in row.samples],
            }
            if base is not None:
                entry["ratio"] = round(row.ratios(base)[1], 4)
            if peer := self.peer(row):
                entry |= {"peer": peer.name, "ratio_to_peer": round(row.ratios(peer)[1], 4)}
                entry["verdict"] = self.verdict(row)
            if row.note:
                entry["note"] = row.note
            rows.append(entry)
        about = {"benchmark": self.name, "baseline": self.baseline}
        return about | {"settings": self.settings, "machine": self.machine, "rows": rows}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def print(self, console: Console | None = None) -> None:
        console = console or Console(width=None if os.isatty(1) else 160)
        base = self.row(self.baseline)
        measures = list(dict.fromkeys(k for row in self.rows for k in row.fidelity))
        table = Table(title=f"{self.name}: {self.machine['cpu']}, {self.settings}", title_justify="left")
        table.add_column("contestant")
        for heading in ("ms", "quartiles", "fastest", f"time / {self.baseline}", "MB", *measures):
            table.add_column(heading, justify="right")
        table.add_column("note")
        group = ""
        for row in self.rows:
            if group and row.group != group:
                table.add_section()
            group = row.group
            if not row.samples:
                table.add_row(row.name, *["-"] * (5 + len(measures)), row.absent, style="dim")
                continue
            low, middle, high = row.quartiles()
            verdict = self.verdict(row)
            style = "red" if verdict.startswith("slower") else "green" if verdict.startswith("faster") else ""
            table.add_row(
                row.name,
                f"{middle:.1f}",
                f"{low:.1f}-{high:.1f}",
                f"{min(row.samples):.1f}",
                f"{row.ratios(base)[1]:.2f}" if base else "-",
                f"{row.bytes / 1e6:.1f}" if row.bytes else "-",
                *(f"{row.fidelity[m]:.5f}" if m in row.fidelity else "-" for m in measures),
                "; ".join(text for text in (verdict, row.note) if text),
                style=style,
            )
        console.print(table)
        load = self.settings.get("load_at_start") or 0
        if load > 0.5:
            console.print(f"Others were at work on this machine (load {load} at the start): trust the ratios more.")


def measure(
    name: str,
    contestants: Iterable[Contestant],
    inputs: Any,
    *,
    baseline: str,
    rounds: int = 15,
    warmup: int = 3,
    pause: float = 0.1,
    assess: Callable[[Callable[[Any], Any]], dict[str, float]] | None = None,
    settings: dict[str, Any] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Result:
    """Prepare everybody, then time all of them side by side.

    `assess` turns a contestant's `run` into measures of fidelity (more is better). A contestant that cannot be prepared
    becomes a row that says why, and the others go on.
    """
    # What other processes were doing; far above 0, the figures are theirs as much as the contestants'.
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    rows, ready = [], []
    for one in contestants:
        row = Row(one.name, one.target, one.group, against=one.against)
        rows.append(row)
        missing = [module for module in one.requires if importlib.util.find_spec(module) is None]
        if missing:
            row.absent = f"not installed: {', '.join(missing)}"
            continue
        log(f"preparing {one.name}")
        start = time.perf_counter()
        try:
            prepared = one.prepare()
            for _ in range(warmup):
                prepared.run(inputs)
            row.fidelity = assess(prepared.run) if assess else {}
        except Exception as error:  # noqa: BLE001  (whatever a peer raises, the row says it and the rest is measured)
            row.absent = f"failed: {without_paths(error)}"
            log(f"  {row.absent}")
            continue
        row.bytes, row.note = prepared.bytes, prepared.note
        row.prepare_seconds = time.perf_counter() - start
        ready.append((row, prepared.run))
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            log(f"round {turn + 1} of {rounds}")
            base = next((row for row, _ in ready if row.name == baseline), None)
            if turn == PATIENCE and base is not None:
                limit = HOPELESS * base.quartiles()[1]
                ready = [(row, run) for row, run in ready if row.quartiles()[1] <= limit]
            first = turn % max(1, len(ready))
            for row, run in ready[first:] + ready[:first]:
                time.sleep(pause)
                run(inputs)
                start = time.perf_counter()
                run(inputs)
                row.samples.append((time.perf_counter() - start) * 1e3)
    except KeyboardInterrupt:  # half an hour of figures is not thrown away; rows may differ by a round
        log("interrupted: what was measured so far follows")
    finally:
        gc.enable()
    how = {"rounds": rounds, "warmup": warmup, "pause_seconds": pause, "load_at_start": load}
    return Result(name, baseline, (settings or {}) | how, rows, machine_facts())


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; where it is emulated it takes ten times as long as fp32."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine_facts()["flags"]))


def machine_facts() -> dict[str, Any]:
    """What one must know to compare with another machine's figures, and nothing that names this one."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            cpu = model[1].strip()
            family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
            number = re.search(r"^model\s*:\s*(\d+)", text, re.MULTILINE)
            cpu += f" (family {family[1]}, model {number[1]})" if family and number else ""
        if line := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            flags = set(line[1].split())
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": [flag for flag in X86 + ARM if flag in flags],
        "lacks": [flag for flag in (ARM if "asimd" in flags else X86) if flag not in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": {},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for library in LIBRARIES:
        try:
            facts["libraries"][library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            pass
    return facts


def bytes_of(*paths: Path) -> int:
    """Bytes of files, and of all files in folders."""
    files = {f for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()}
    return sum(f.stat().st_size for f in files)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def without_paths(error: BaseException) -> str:
    """The first line of an error, without folders of this machine."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", lines[0]).strip()
    return f"{type(error).__name__}: {text[:160]}"
