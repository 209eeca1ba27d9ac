"""Recognition and raising of random programs: planted sites found or refused with a reason, numbers equal, a second run idle.

    python -m benchmarks.fuzz --programs 5000 [--seed 0] [--json FILE]

Exit status 1 if anything was wrong; each failure is printed with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.fuzz_programs import random_model

__all__ = ["check"]

SHAPES = ((2, 5), (1, 3), (3, 4))  # batch and tokens; 3 and 4 are numbers of heads as well


def check(seed: int) -> dict[str, Any]:
    """Make the program of a seed and check it.

    Returns
    -------
    dict
        ``text`` of the program, ``planted``, ``found`` by kind, ``missed`` (planted sites that are told of as near misses),
        ``wrong`` (sentences; empty if all is well).
    """
    from recast.passes.rules.raise_structures import raise_program
    from recast.passes.verify import exact_bound
    from recast.patterns.capture.export import capture
    from recast.patterns.recognise import recognise

    model, planted, text = random_model(seed)
    torch.manual_seed(seed)
    program = capture(model, (torch.randn(2, 5, 12),))
    seen = recognise(program)
    found = {kind: sum(site.kind == kind for site in seen.sites) for kind in planted}
    told = {kind: sum(miss.kind == kind for miss in seen.misses) for kind in planted}
    wrong = []
    for kind, count in planted.items():
        if found[kind] + told[kind] < count:
            wrong.append(f"{count} {kind} planted, {found[kind]} found and {told[kind]} told of")
        if found[kind] > count:
            wrong.append(f"{count} {kind} planted, {found[kind]} found")
    if unsaid := [miss.name for miss in seen.misses if not miss.reason]:
        wrong.append(f"no reason is given for {unsaid}")
    raised = raise_program(program)
    if (again := str(raise_program(raised))) != str(raised):
        wrong.append("raising a second time changes the program")
        del again
    with torch.no_grad():
        for batch, tokens in SHAPES:
            x = torch.randn(batch, tokens, 12)
            for a, b in zip(model(x), raised(x), strict=True):
                gap = float((a - b).norm() / a.norm().clamp_min(1e-30))
                if not gap <= exact_bound(torch.float32):
                    wrong.append(f"outputs differ by {gap:.3g} at batch {batch}, tokens {tokens}")
    return {"seed": seed, "text": text, "planted": planted, "found": found, "missed": told, "wrong": wrong}


def main() -> None:
    """Run by command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the totals and every failure there")
    given = parser.parse_args()
    start = time.perf_counter()
    planted: dict[str, int] = {}
    found: dict[str, int] = {}
    failures = []
    for seed in track(range(given.seed, given.seed + given.programs), "fuzzing", disable=not sys.stderr.isatty()):
        try:
            row = check(seed)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a failure of this program
            row = {"seed": seed, "text": random_model(seed)[2], "wrong": [f"{type(error).__name__}: {error}"]}
        for kind, count in row.get("planted", {}).items():
            planted[kind] = planted.get(kind, 0) + count
            found[kind] = found.get(kind, 0) + row["found"][kind]
        if row["wrong"]:
            failures.append(row)
            print(f"seed {seed}: {row['text']}\n  " + "\n  ".join(row["wrong"]), flush=True)
    total = {
        "name": "fuzz",
        "programs": given.programs,
        "first_seed": given.seed,
        "wrong": len(failures),
        "planted": planted,
        "found": found,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(total))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**total, "failures": failures}, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
