"""Triton kernels compiled for machines that are not here: nothing spills, matrix units are used, loads are wide."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: functions that this one made for Triton's interpreter cannot be compiled.
_PROGRAM = """
import json, sys
from recast.kernels.offline import cases, compile_case
print(json.dumps({case.name: compile_case(case, sys.argv[1]).to_dict() for case in cases(sys.argv[1])}))
"""


@pytest.mark.parametrize(
    ("target", "unit"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")]
)
def test_every_configuration_compiles_clean(target: str, unit: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, target], capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert len(found) >= 10
    for name, row in found.items():
        assert row["clean"], (name, row)
        assert row["registers"] <= (512 if target == "gfx942" else 255), (name, row)
    # Where tokens are many, the newest matrix unit of the machine is meant.
    many = next(row for name, row in found.items() if "128 tokens" in name)
    assert any(instruction.startswith(unit) for instruction in many["matrix"]), many
    if target.startswith("sm_"):
        # A GPU has about three operations for each four-bit weight in the time that memory needs to bring it.
        assert found["int4 g128, 8 tokens"]["loop"] <= 3 * 64
