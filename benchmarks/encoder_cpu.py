"""MiniLM-L6 on a CPU, 32 sentences x 128 tokens: recast beside PyTorch, ONNX Runtime and OpenVINO, in one process.

python -m benchmarks.encoder_cpu --json benchmarks/results/encoder_cpu.json
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoder_inputs import BATCH, TOKENS, cosines, encoder, texts
from benchmarks.encoder_peers import Bench, peers
from benchmarks.harness import Contestant, measure


def recast_contestants(bench: Bench) -> dict[str, Contestant]:
    """recast's recipes on each target, by name.

    A contestant's `prepare()` returns `Ready(run, bytes, note)`: `run((ids, mask))` gives the embeddings [32, 384],
    `bytes` are those of the files needed at run time. `group="recast"`; `against` names the peers a row is held to.
    """
    return {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder_cpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--quick", action="store_true", help="three rounds instead of fifteen: a look, not a measurement"
    )
    parser.add_argument("--rounds", type=int, help="rounds, each one timed call of everybody")
    parser.add_argument("--threads", type=int, default=2, help="threads for everybody (default: 2)")
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants whose name matches, and the baseline")
    chosen = parser.parse_args(arguments)

    start = time.monotonic()
    torch.set_num_threads(chosen.threads)
    baseline = "PyTorch eager"
    model, given = encoder(), texts()
    with torch.no_grad():
        references = [(batch, model(*batch)) for batch in (given.timed, given.padded)]

    def assess(run: Callable[[Any], Any]) -> dict[str, float]:
        outputs = [(reference, run(batch)) for batch, reference in references]
        if any(output is None for _, output in outputs):  # the floor computes nothing meant
            return {}
        found = torch.cat([cosines(reference, output) for reference, output in outputs])
        return {"mean cosine": found.mean().item(), "worst cosine": found.min().item()}

    with tempfile.TemporaryDirectory(prefix="recast-bench-") as folder:
        bench = Bench(model, given, Path(folder), chosen.threads)
        everybody = [*recast_contestants(bench).values(), *peers(bench)]
        # Peers first and the floor last, whatever order they come in.
        everybody.sort(key=lambda one: ("peer", "recast", "floor").index(one.group))
        result = measure(
            "encoder_cpu",
            [one for one in everybody if one.name == baseline or re.search(chosen.only, one.name)],
            given.timed,
            baseline=baseline,
            rounds=chosen.rounds or (3 if chosen.quick else 15),
            warmup=2,
            assess=assess,
            settings={"model": "MiniLM-L6", "batch": BATCH, "tokens": TOKENS, "threads": chosen.threads},
            log=lambda text: print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True),
        )
    result.print()
    if chosen.json:
        result.save(chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
