"""Recognition, raising and simplifying of random programs: planted sites found or refused, numbers equal, a second run idle.

    python -m benchmarks.fuzz --programs 5000 [--seed 0] [--json FILE] [--processes 2] [--pieces FOLDER]

Most programs are put together from captured pieces (see fuzz_pieces.py); one in 250 is exported as a whole and compared with
what its pieces gave. With --json, a run that was cut short goes on where FILE ends; with --pieces, with the pieces it captured.
Exit status 1 if anything was wrong; each failure is printed with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.fuzz_pieces import Pieces, keep_as_result
from benchmarks.fuzz_programs import WIDTH, Model, random_model

__all__ = ["check", "examine"]

SHAPES = ((2, 5), (1, 3), (3, 4))  # batch and tokens; 3 and 4 are numbers of heads as well
WHOLE = 250  # every so many programs, one is exported as a whole
SAVED = 25  # programs between two writings of the file


def check(seed: int, pieces: Pieces) -> dict[str, Any]:
    """Make the program of a seed and check it.

    Returns
    -------
    dict
        ``text`` of the program, ``planted``, ``found`` by kind, ``refused`` (planted sites that are told of as near misses),
        ``wrong`` (sentences; empty if all is well), ``exported`` (whether the pieces did not do).
    """
    model, planted, text = random_model(seed)
    torch.manual_seed(seed)
    inputs = [torch.randn(batch, tokens, WIDTH) for batch, tokens in SHAPES]
    program, wrong = _put_together(model, pieces, inputs), list[str]()
    exported = program is None or seed % WHOLE == 0
    if program is None or exported:
        from recast.patterns.capture.export import capture

        whole = capture(model, (inputs[0],))
        if program is not None and _sites(whole) != _sites(program):
            wrong.append(f"{_sites(whole)} in the whole, {_sites(program)} in its pieces")
        program = whole
    draw = random.Random(f"user {seed}")
    if draw.random() < 0.4:
        text += f", result {keep_as_result(program, draw.randrange(10**6))}"
    row = examine(program, planted, inputs, simplified=draw.choice(("captured", "raised", "not", "not", "not", "not")))
    return {"seed": seed, "text": text, "planted": planted, **row, "wrong": wrong + row["wrong"], "exported": exported}


def examine(program: Any, planted: dict[str, int], inputs: Iterable[Tensor], *, simplified: str) -> dict[str, Any]:
    """What is found in a program and what was planted; raised, and simplified as ``captured`` or as ``raised``, against itself."""
    from recast.passes.rules.raise_structures import raise_program
    from recast.passes.simplify import simplify
    from recast.patterns.recognise import recognise

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
    runs = [("raising", raised, raise_program(raised))]
    if simplified != "not":
        simpler = simplify(raised if simplified == "raised" else program, verification=False)
        runs.append(("simplifying", simpler, simplify(simpler, verification=False)))
    for name, after, again in runs:
        if _listing(again) != _listing(after):
            wrong.append(f"{name} a second time changes the program")
        wrong += [f"after {name}, {words}" for words in _differences(program, after, inputs)]
    refused = {kind: max(0, count - found[kind]) for kind, count in planted.items()}
    return {"found": found, "refused": refused, "wrong": wrong, "reasons": [str(miss.reason) for miss in seen.misses]}


def _listing(program: Any) -> list[tuple[str, ...]]:
    return [(node.name, str(node.target), str(node.args), str(node.kwargs)) for node in program.graph.nodes]


def _differences(before: Any, after: Any, inputs: Iterable[Tensor]) -> list[str]:
    from recast.passes.verify import exact_bound

    told = []
    with torch.no_grad():
        for x in inputs:
            for i, (a, b) in enumerate(zip(before(x), after(x), strict=True)):
                gap = float((a - b).norm() / a.norm().clamp_min(1e-30)) if a.shape == b.shape else float("inf")
                if not gap <= exact_bound(torch.float32):
                    told.append(f"result {i} differs by {gap:.3g} at batch {x.shape[0]}, tokens {x.shape[1]}")
    return told


def _put_together(model: Model, pieces: Pieces, inputs: Iterable[Tensor]) -> Any:
    """The model's program of pieces, or None if it does not run as the model does."""
    try:
        program = pieces.program(model)
        return None if _differences(model, program, inputs) else program
    except RuntimeError:  # a view of what lies otherwise in memory than where the piece was captured
        return None


def _sites(program: Any) -> Counter[tuple[str, str]]:
    from recast.patterns.recognise import recognise

    return Counter((site.kind, site.name) for site in recognise(program).sites if site.kind != "norm")


def main() -> None:
    """Run by command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the totals and every failure there")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--pieces", type=Path, metavar="FOLDER", help="keep captured pieces there; to be emptied when capture changes"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    total: dict[str, Any] = {"name": "fuzz", "first_seed": given.seed, "programs": 0, "wrong": 0, "exported_whole": 0}
    total |= {"seconds": 0.0, "planted": {}, "found": {}, "refused": {}, "reasons": {}, "failures": []}
    if given.json and given.json.exists():
        earlier = json.loads(given.json.read_text(encoding="utf-8"))
        if earlier["first_seed"] == given.seed:
            total |= earlier
    start, spent = time.perf_counter(), total["seconds"]
    left = range(given.seed + total["programs"], given.seed + given.programs)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.pieces or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _pieces().prepare((random_model(seed)[0] for seed in left), folder, given.processes)
    # What is captured is shared by all processes: they are forked from this one.
    with multiprocessing.get_context("fork").Pool(given.processes) as pool:
        rows = pool.imap(_checked, left, chunksize=5)
        for seed, row in zip(left, track(rows, "fuzzing", len(left), disable=not sys.stderr.isatty()), strict=True):
            _count(total, row)
            if row["wrong"]:
                print(f"seed {seed}: {row['text']}\n  " + "\n  ".join(row["wrong"]), flush=True)
            total["seconds"] = round(spent + time.perf_counter() - start, 1)
            if given.json and ((seed + 1) % SAVED == 0 or seed == left[-1]):
                given.json.parent.mkdir(parents=True, exist_ok=True)
                partial = given.json.with_name(given.json.name + ".partial")
                partial.write_text(json.dumps(total, indent=1) + "\n", encoding="utf-8")
                partial.replace(given.json)
    print(json.dumps({key: value for key, value in total.items() if key not in ("failures", "reasons")}))
    raise SystemExit(1 if total["wrong"] else 0)


@functools.cache
def _pieces() -> Pieces:
    return Pieces()


def _checked(seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        row = check(seed, _pieces())
    except Exception as error:  # noqa: BLE001  # whatever it is, it is a failure of this program
        row = {"seed": seed, "text": random_model(seed)[2], "wrong": [f"{type(error).__name__}: {error}"]}
    return row | {"seconds": time.process_time() - start}


def _count(total: dict[str, Any], row: dict[str, Any]) -> None:
    total["programs"] += 1
    total["wrong"] += bool(row["wrong"])
    total["exported_whole"] += row.get("exported", False)
    total["program_seconds"] = round(total.get("program_seconds", 0.0) + row["seconds"], 2)
    for name in ("planted", "found", "refused"):
        for kind, count in row.get(name, {}).items():
            total[name][kind] = total[name].get(kind, 0) + count
    for reason in row.get("reasons", ()):
        words = " ".join(
            word for word in reason.split() if not any(c.isdigit() for c in word)
        )  # names of values differ
        total["reasons"][words] = total["reasons"].get(words, 0) + 1
    if row["wrong"]:
        total["failures"].append({key: row[key] for key in ("seed", "text", "wrong")})


if __name__ == "__main__":
    main()
