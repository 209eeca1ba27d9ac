"""One call of `benchmarks.kernels_gpu`: what is left to do, done in order until the time is over, and written as it is found."""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.harness import machine_facts, without_paths
from benchmarks.kernels_gpu_check import checked, gap, in_process, told, wide, within
from benchmarks.kernels_gpu_marks import (
    DENSE,
    LAYERS,
    QUICK_LAYERS,
    QUICK_TOKENS,
    STACK,
    TOKENS,
    Group,
    held,
    plan,
)
from benchmarks.kernels_gpu_sources import dense_cases, source_of, triton_version
from benchmarks.kernels_gpu_stack import QUICK_SIZES, SIZES, stack
from benchmarks.kernels_gpu_table import checks_table, marks_table, rows_table
from benchmarks.kernels_gpu_time import ROUNDS, Clock, Cuda, Turn, copies, figures, rounds, turn
from recast.kernels.timed import BenchCase, Prepared, Run, cases

# Seconds that a step is thought to take before any was seen: what is tuned compiles long.
RESERVE, RESERVE_TUNED, RESERVE_STACK = 10.0, 25.0, 120.0
WAYS_FROM = 64  # tokens; for fewer, memory binds, and writing a weight out moves it several times


class Over(Exception):
    """The time is over."""


class Session:
    """Rows, checks and marks of one file."""

    def __init__(self, asked: argparse.Namespace, console: Console) -> None:
        self.asked, self.console = asked, console
        self.clock: Clock = Cuda() if asked.device == "cuda" else Clock()
        self.layers = QUICK_LAYERS if asked.quick else LAYERS
        self.tokens = QUICK_TOKENS if asked.quick else TOKENS
        self.cases = {case.name: case for case in (*dense_cases(), *cases())}
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.stopped = ""
        self._end = asked.begun + 60 * asked.minutes
        self._longest: dict[str, float] = {}
        self._ready: dict[str, tuple[Prepared, Sequence[Mapping[str, Tensor]], Run]] = {}
        self._layer = ""
        self.machine = machine_facts() | {"device": self.clock.facts()}
        self.machine["libraries"] |= triton_version()
        if asked.resume and asked.json is not None and asked.json.is_file():
            self._go_on(json.loads(asked.json.read_text(encoding="utf-8")))

    def _go_on(self, before: dict[str, Any]) -> None:
        """Keep what the same source gave on the same device; refuse another device's file."""

        def where(machine: Mapping[str, Any]) -> list[Any]:
            libraries = machine["libraries"]
            device = machine.get("gpu", machine["cpu"]) if self.clock.device.type == "cuda" else machine["cpu"]
            return [device, libraries.get("torch"), libraries.get("triton")]

        if where(before["machine"]) != where(self.machine):
            raise ValueError(
                f"{self.asked.json.name} was measured on {where(before['machine'])}, this is {where(self.machine)}; "
                "without --resume the file is begun anew"
            )
        kernels = {case.name: case.kernel for case in self.cases.values()} | {STACK: "quantized_matmul"}
        self.rows = [
            r for r in before["rows"] if r["name"] in kernels and r["source"] == self._source(kernels[r["name"]])
        ]
        for row in self.rows:  # what a check said of all rows is said anew
            row["wrong"] = row.get("limit") is not None and not within(row)
        self.checks = [
            c
            for c in before["checks"]
            if c["case"] in kernels and not c["failed"] and c["source"] == self._source(c["kernel"])
        ]

    @functools.cache  # noqa: B019  (a session lives as long as the command)
    def _source(self, kernel: str) -> str:
        return source_of(kernel)

    def run(self) -> None:
        """Check, then time, until all is done or the time is over."""
        try:
            with torch.no_grad():
                self._check()
                for group in plan(list(self.cases.values()), self.layers, self.tokens):
                    self._measure(group)
        except Over:
            self.stopped = "the time is over; the same command with --resume goes on"
        self.save()

    def _left(self, what: str = "") -> float:
        """Seconds left beside what a step of this kind took at most; raises where none are."""
        tuned = what in self.cases and self.cases[what].compiled.startswith("max-autotune")
        first = RESERVE_STACK if what == STACK else RESERVE_TUNED if tuned else RESERVE
        seen = self._longest.get(what, 0.0 if self.asked.quick else first)
        left = self._end - time.monotonic() - 1.2 * seen
        if left <= 0:
            raise Over
        return left

    def _wanted(self, title: str) -> bool:
        return re.search(self.asked.only, title) is not None

    def _check(self) -> None:
        """All cases that were not checked yet, each in a process of its own; in this one in the interpreter."""
        there = {check["case"] for check in self.checks}
        titles = {
            name: [name] + [Group(layer, count, ()).title(name) for layer in self.layers for count in self.tokens]
            for name, case in self.cases.items()
            if case.kernel and name not in there
        }
        rest = [self.cases[name] for name, several in titles.items() if any(map(self._wanted, several))]
        if self.clock.device.type == "cpu":
            for case in rest:
                self._left("check")
                with torch.enable_grad():
                    self._checked(case, checked(case, self.clock.device, quick=True))
            return
        with ThreadPoolExecutor(max(1, self.asked.processes)) as pool:
            for case, found in zip(rest, pool.map(self._in_process, rest), strict=True):
                if found is not None:
                    self._checked(case, found)
        self._left("check")

    def _in_process(self, case: BenchCase) -> dict[str, Any] | None:
        """None where the time is over before its checks are."""
        try:
            return in_process(case, self._left("check"), quick=self.asked.quick)
        except Over:
            return None

    def _checked(self, case: BenchCase, found: dict[str, Any]) -> None:
        self.checks.append(found | {"source": self._source(case.kernel)})
        self.save()
        said = f"{len(found['failed'])} failed, first: {found['failed'][0]}" if found["failed"] else "right"
        self.console.log(f"{case.name}: {found['checks']} checks, {said}", markup=False)

    def _measure(self, group: Group) -> None:
        """Time what is missing of a group, beside the dense product."""
        there = {row["name"] for row in self.rows if (row["layer"], row["tokens"]) == (group.layer, group.tokens)}
        wanted = [n for n in group.names if n not in there and (n == DENSE or self._wanted(group.title(n)))]
        if not set(wanted) - {DENSE}:
            return
        if group.names == (STACK,):
            self._stack(group)
            return
        self._at(group.layer)
        rows, inputs = self.layers[group.layer]
        x = torch.randn(group.tokens, inputs, device=self.clock.device).bfloat16()
        turns: list[tuple[str, dict[str, Any], list[Turn]]] = []
        over = False
        for name in [DENSE, *(n for n in wanted if n != DENSE)]:
            row = {"layer": group.layer, "shape": [rows, inputs], "tokens": group.tokens, **self._about(name)}
            start = time.monotonic()
            try:
                self._left(name)
                turns.append((name, *self._turns(name, row, x)))
            except Over:
                over = True
                break
            except Exception as error:  # noqa: BLE001  (whatever a contestant raises, its row says it; others go on)
                self._failed(row, error)
            self._longest[name] = max(self._longest.get(name, 0.0), time.monotonic() - start)
        if turns and turns[0][0] == DENSE:
            rounds([t for _, _, several in turns for t in several], self.clock, 3 if self.asked.quick else ROUNDS)
            base = turns[0][2][0]
            for name, row, several in turns:
                fastest = min(several, key=lambda one: one.median)
                if name != DENSE or DENSE not in there:
                    self.rows.append(row | figures(fastest, base) | self._of_floor(row, fastest))
                    if len(several) > 1:
                        self.rows[-1]["way"] = fastest.name
            self.console.log(f"{group.layer}, {group.tokens} tokens: {len(turns) - 1} beside {DENSE}", markup=False)
        self.save()
        if over:
            raise Over

    def _at(self, layer: str) -> None:
        """Weights of one layer at a time are held."""
        if layer != self._layer:
            self._ready.clear()
            self._layer = layer
            if self.clock.device.type == "cuda":
                torch.cuda.empty_cache()

    def _about(self, name: str) -> dict[str, Any]:
        case = self.cases[name]
        known = {"name": name, "family": case.family, "kernel": case.kernel, "peer": case.peer}
        return known | {"against": list(case.against), "source": self._source(case.kernel)}

    def _turns(self, name: str, row: dict[str, Any], x: Tensor) -> tuple[dict[str, Any], list[Turn]]:
        """Lay a form out, unless another number of tokens did; compare it with its meaning; warm it up."""
        case = self.cases[name]
        if name not in self._ready:
            prepared = case.prepare(*row["shape"], torch.bfloat16, self.clock.device)
            run = self.clock.compiled(prepared.run, case.compiled) if case.compiled else prepared.run
            self._ready[name] = prepared, copies(prepared, self.clock.cache), run
        prepared, held, run = self._ready[name]
        error = gap(run(held[0], x), prepared.meant(wide(prepared), x.double()), case.roundings)
        work = prepared.work(row["tokens"])
        row |= told(error) | {
            "weight bytes": prepared.work(0).bytes,
            "bytes": work.bytes,
            "flops": work.flops,
            "rate": work.rate,
        }
        if (floor := self.clock.floor(work)) is not None:
            row["floor milliseconds"] = float(f"{1e3 * floor:.4g}")
        ways = {name: run, **(prepared.ways if row["tokens"] >= WAYS_FROM else {})}
        return row, [turn(way, one, held, x, self.clock) for way, one in ways.items()]

    def _of_floor(self, row: Mapping[str, Any], fastest: Turn) -> dict[str, Any]:
        """The share of the least time that is reached."""
        floor = row.get("floor milliseconds")
        return {} if floor is None else {"share": round(floor / (1e3 * fastest.median), 4)}

    def _stack(self, group: Group) -> None:
        row: dict[str, Any] = {"layer": group.layer, "tokens": 1, "name": STACK, "family": "stack", "peer": False}
        row |= {"kernel": "quantized_matmul", "source": self._source("quantized_matmul")}
        self._left(STACK)
        self._at("")
        sizes = QUICK_SIZES if self.asked.quick else SIZES
        try:
            row |= stack(self.cases["int4 g128"], self.clock, sizes, 3 if self.asked.quick else ROUNDS)
            self.rows.append(row)
            self.console.log(f"{STACK}: {row['speed']} times the speed of bf16", markup=False)
        except Exception as error:  # noqa: BLE001  (the row says it; layers are still to be measured)
            self._failed(row, error)
        self.save()

    def _failed(self, row: dict[str, Any], error: Exception) -> None:
        """Tell why in the row; where the device itself is lost nothing more can be measured."""
        self.rows.append(row | {"absent": without_paths(error)})
        self.console.log(f"{row['name']}: {self.rows[-1]['absent']}", markup=False)
        try:
            self.clock.wait()
        except Exception as lost:  # noqa: BLE001
            self.rows[-1]["wrong"] = not row["peer"]
            self.save()
            raise SystemExit(
                f"kernels_gpu: the device is lost after {row['name']} ({without_paths(lost)}); --resume goes on"
            ) from None

    def wrong(self) -> list[str]:
        """Names of kernels that are not what they should be."""
        found = [c["case"] for c in self.checks if c["failed"] and not c["peer"]]
        return list(dict.fromkeys(found + [r["name"] for r in self.rows if r.get("wrong") and not r["peer"]]))

    def marks(self) -> list[dict[str, Any]]:
        """What is held to, and what was measured of it."""
        forms = [case.name for case in self.cases.values() if case.kernel and case.timed and not case.peer]
        return held(self._judged(), self.layers, self.tokens, forms)

    def _judged(self) -> list[dict[str, Any]]:
        """Rows, `wrong` where a check of their kernel's form failed."""
        bad = {c["case"] for c in self.checks if c["failed"] and not c["peer"]}
        return [row | {"wrong": True} if row["name"] in bad else row for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """The file."""
        about = {"quick": self.asked.quick, "layers": self.layers, "tokens": list(self.tokens), "rounds": ROUNDS}
        return {
            "benchmark": "kernels_gpu", "baseline": DENSE, "settings": about, "machine": self.machine,
            "stopped": self.stopped, "marks": self.marks(), "checks": self.checks, "rows": self._judged(),
        }  # fmt: skip

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.asked.json is None:
            return
        self.asked.json.parent.mkdir(parents=True, exist_ok=True)
        partial = self.asked.json.with_name(self.asked.json.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(self.asked.json)

    def show(self) -> None:
        """Print what was measured, what is wrong, and the marks last."""
        rows = self._judged()
        for layer in dict.fromkeys(row["layer"] for row in rows if row["name"] != STACK):
            self.console.print(rows_table(layer, rows))
        self.console.print(checks_table(self.checks, rows))
        self.console.print(marks_table(self.marks()))
        if self.stopped:
            self.console.print(self.stopped)
