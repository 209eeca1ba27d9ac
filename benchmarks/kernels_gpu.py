"""Every kernel on a GPU: whether it is right, how fast it is, and what it is held to.

    python -m benchmarks.kernels_gpu --json FILE --minutes 9 [--only REGEX] [--resume]

First each kernel is compared with its meaning in float64, at shapes that divide by nothing. Then forms of weights are timed at layers
of Llama-3, beside the dense product (eager and tuned by torch.compile) and what PyTorch has for the same form, all in turns, with
copies of weights that do not fit the cache together and CUDA graphs. What marks are set for comes first; rows are written as they are
measured; before M minutes are over the command ends, and goes on where it was with `--resume`, for kernels whose source is the same.
Ends with status 1 if a kernel is wrong, 2 without a GPU. `--device cpu --quick` goes the same way in Triton's interpreter, for tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

QUICK = "--device cpu --quick runs the same program in Triton's interpreter, with small shapes"


def arguments(given: list[str] | None) -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and marks there, after each measurement")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="end before so many are over")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="rows that match, as '8B down, 16 tokens, int4 g128'"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep rows and checks of kernels whose source is the same"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: no measurement")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="that check at a time")
    parser.add_argument(
        "--picture", type=Path, metavar="FOLDER", help="draw the rows of --json there, and measure nothing"
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Check, measure, print, write."""
    begun = time.monotonic()
    asked = arguments(given)
    asked.begun = begun
    if asked.picture is not None:
        return pictures(asked)
    if asked.device == "cpu":
        if not asked.quick:
            return refused(f"a CPU has no times of these kernels; {QUICK}")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's functions are first imported
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        return refused(f"torch finds no CUDA device here; {QUICK}")
    if asked.device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    from rich.console import Console

    from benchmarks.kernels_gpu_session import Session

    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        session = Session(asked, console)
    except ValueError as error:
        return refused(str(error))
    session.run()
    session.show()
    return 1 if session.wrong() else 0


def pictures(asked: argparse.Namespace) -> int:
    """One picture for each family, of what was measured."""
    from benchmarks.kernels_gpu_picture import draw

    if asked.json is None or not asked.json.is_file():
        return refused("--picture draws the rows of --json FILE; there is no such file")
    rows: list[dict[str, Any]] = json.loads(asked.json.read_text(encoding="utf-8"))["rows"]
    asked.picture.mkdir(parents=True, exist_ok=True)
    families = dict.fromkeys(
        row["family"] for row in rows if "ratio" in row and row["family"] not in ("dense", "stack")
    )
    if not families:
        return refused(f"{asked.json.name} has no measured rows to draw")
    for family in families:
        file = asked.picture / f"kernels_{re.sub('[^a-z0-9]+', '_', family.lower())}.svg"
        file.write_text(draw(rows, family), encoding="utf-8")
    return 0


def refused(why: str) -> int:
    """Say why nothing is done."""
    print(f"kernels_gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
