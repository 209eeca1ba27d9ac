"""Random programs of blocks in random spellings: what was planted is found or refused with a reason, and nothing changes a number.

The generator is that of ``benchmarks/fuzz.py``, which runs thousands; a few dozen are enough to notice a rule that broke.
"""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recast
from recast.passes.rules.raise_structures import raise_program
from tests.helpers import assert_close

ROOT = Path(__file__).resolve().parents[2]
TERMS = 64 * 12  # a value of the result: some dozens of sums of a dozen terms, one after the other


def _fuzzer() -> Any:
    """The modules of the fuzzer; `benchmarks` is not installed, and the root of the checkout is not on the path."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module("benchmarks.fuzz")


FUZZ = _fuzzer()


@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False))
def test_planted_sites_numbers_and_a_second_run(draw: random.Random) -> None:
    model, planted, text = FUZZ.random_model(draw)
    inputs = [torch.randn(batch, tokens, 12) for batch, tokens in FUZZ.SHAPES]
    program = recast.capture(model, (inputs[0],))
    if draw.random() < 0.4:
        text += f", result {FUZZ.keep_as_result(program, draw.randrange(10**6))}"
    row = FUZZ.examine(program, planted, inputs, simplified=draw.choice(("captured", "raised")))
    assert not row["wrong"], text
    raised = raise_program(program)
    with torch.no_grad():
        for x in inputs:
            for found, wanted in zip(raised(x), model(x), strict=False):
                assert_close(found, wanted, terms=TERMS)
