"""Triton kernels compiled for machines that are not here: nothing spills, matrix units are used, loads are wide.

Compiling every configuration for every target takes half an hour. `benchmarks.kernel_resources` does, and its results are part of
the repository; here they are held to be those of the sources as they stand, and some of each target are compiled again.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from recast.kernels.offline import cases

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_resources.json"
AGAIN = "python -m benchmarks.kernel_resources --json benchmarks/results/kernel_resources.json --resume"
UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# In processes of their own: functions that this one made for Triton's interpreter have no source to compile.
_DIGESTS = """
import json
from recast.kernels.offline import TARGETS, cases, digest
print(json.dumps({target: {digest(case, target): case.name for case in cases(target)} for target in TARGETS}))
"""
_COMPILE = """
import json, sys
from recast.kernels.offline import cases, compile_case, digest
target, *wanted = sys.argv[1:]
chosen = [case for case in cases(target) if case.name in wanted]
print(json.dumps([[case.name, digest(case, target), compile_case(case, target).to_dict()] for case in chosen]))
"""


def told(program: str, *arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@functools.cache
def recorded() -> Any:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_results_are_those_of_the_sources_and_clean() -> None:
    now = told(_DIGESTS)
    rows = {(row["target"], row.get("source")): row for row in recorded()["rows"]}
    for target, unit in UNITS.items():
        assert len(now[target]) >= 60
        missing = [name for source, name in now[target].items() if (target, source) not in rows]
        assert not missing, f"{target}: the results are of other sources; {AGAIN} makes them anew: {missing}"
        found = {name: rows[target, source] for source, name in now[target].items()}
        for name, row in found.items():
            assert row["clean"], (target, name, row)
            assert row["registers"] <= (512 if target == "gfx942" else 255), (target, name, row)
        # Where tokens are many, the newest matrix unit of the machine is meant.
        many = next(row for name, row in found.items() if "128 tokens" in name)
        assert any(instruction.startswith(unit) for instruction in many["matrix"]), many
        if target.startswith("sm_"):
            # A GPU has about three operations for each four-bit weight in the time that memory needs to bring it.
            assert found["int4 g128, 8 tokens"]["loop"] <= 3 * 64
    assert {(row["target"], row["source"]) for row in recorded()["rows"]} == {(t, s) for t in UNITS for s in now[t]}


@pytest.mark.parametrize("target", list(UNITS))
def test_some_compile_to_what_is_recorded(target: str) -> None:
    """One configuration of each kernel, another one for each target."""
    by_kernel: dict[str, list[str]] = {}
    for case in cases(target):
        by_kernel.setdefault(case.kernel, []).append(case.name)
    turn = list(UNITS).index(target)
    chosen = [names[turn % len(names)] for names in by_kernel.values()]
    # By source: configurations that are compiled alike, as a product and its gradient may be, have one row under either's name.
    rows = {row["source"]: row for row in recorded()["rows"] if row["target"] == target}
    compiled = told(_COMPILE, target, *chosen)
    assert {name for name, _, _ in compiled} == set(chosen)
    for name, source, found in compiled:
        assert found["clean"], (name, found)
        if version("triton") == recorded()["triton"]:
            held = {key: value for key, value in rows[source].items() if key in found and key != "case"}
            assert {key: found[key] for key in held} == held, name
            assert held["registers"] > 0
