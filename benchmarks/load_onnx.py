"""Loading a model of about a gigabyte: seconds and memory of recast's runtime, and of others on the same file or weights.

A stack of wide linears is exported with its weights in a file of their own; ONNX Runtime reads the same file, torch and safetensors the
same weights. Each way runs in a fresh process, the files in the page cache: seconds to load and for the first call, and what the
process holds beyond its imports, from ``/proc/self``: pages that are its own, and pages of files, which are mapped (other processes
share them, and the system may drop them).

    python -m benchmarks.load_onnx --json FILE [--megabytes 1024] [--recipe dense] [--threads 2] [--rounds 3]
        [--folder DIR] [--only REGEX]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WIDTH = 4096  # a matrix of float32 is 64 MiB
_TOKENS = 1


def sizes(megabytes: int, width: int = _WIDTH) -> tuple[int, int]:
    """Layers and their width for so many MiB of float32; narrower ones where one would be more than that.

    >>> sizes(1024), sizes(1)
    ((16, 4096), (4, 256))
    """
    while width > 256 and 4 * width * width > megabytes << 18:
        width //= 2
    return max(1, (megabytes << 18) // (width * width)), width


def make(folder: Path, megabytes: int, recipe: str) -> None:
    """Write the artifact, and the same weights as torch and safetensors keep them."""
    import torch
    from safetensors.torch import save_file

    import recast

    layers, width = sizes(megabytes)
    torch.manual_seed(0)
    linears = [torch.nn.Linear(width, width) for _ in range(layers)]
    model = torch.nn.Sequential(*(m for one in linears for m in (one, torch.nn.ReLU()))).eval()
    program = recast.capture(model, (torch.randn(3, width),))
    if recipe != "dense":
        program = recast.rewrite(program, recast.plan(program, recipe), verification=False)
    torch.save(dict(model.state_dict()), folder / "weights.pt")
    save_file(dict(model.state_dict()), folder / "weights.safetensors")
    recast.lower(program, target="onnx", external_data=True).save(folder / "artifact", force=True)


def _with_recast(folder: Path, threads: int, width: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import onnxruntime  # noqa: F401  # as others import it before the clock runs
    import torch

    import recast

    torch.set_num_threads(threads)
    return lambda: recast.load(folder / "artifact"), lambda artifact: artifact(torch.randn(_TOKENS, width))


def _with_onnxruntime(
    folder: Path, threads: int, width: int, packed: bool = True
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    path, providers = str(folder / "artifact" / "model.onnx"), ["CPUExecutionProvider"]

    def run(session: Any) -> Any:
        name = session.get_inputs()[0].name
        return session.run(None, {name: np.zeros((_TOKENS, width), np.float32)})

    return lambda: onnxruntime.InferenceSession(path, options, providers=providers), run


def _with_torch(
    folder: Path, threads: int, width: int, mapped: bool = False
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import torch

    torch.set_num_threads(threads)
    return lambda: torch.load(folder / "weights.pt", mmap=mapped, weights_only=True), _products(width)


def _with_safetensors(folder: Path, threads: int, width: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    return lambda: load_file(folder / "weights.safetensors"), _products(width)


def _products(width: int) -> Callable[[Any], Any]:
    import torch

    def run(weights: dict[str, Any]) -> Any:
        x = torch.zeros(_TOKENS, width)
        for name in [n for n in weights if n.endswith("weight")]:
            x = torch.nn.functional.linear(x, weights[name], weights[name.replace("weight", "bias")]).relu()
        return x

    return run


WAYS: dict[str, tuple[Callable[..., tuple[Callable[[], Any], Callable[[Any], Any]]], str, dict[str, Any]]] = {
    "recast.load": (_with_recast, "artifact", {}),
    "onnxruntime.InferenceSession": (_with_onnxruntime, "artifact", {}),
    "onnxruntime.InferenceSession, weights not packed": (_with_onnxruntime, "artifact", {"packed": False}),
    "torch.load": (_with_torch, "weights.pt", {}),
    "torch.load, mmap=True": (_with_torch, "weights.pt", {"mapped": True}),
    "safetensors.torch.load_file": (_with_safetensors, "weights.safetensors", {}),
}


def memory() -> dict[str, float]:
    """What this process holds, in MiB: all of it, its own pages, those of files, and the peak."""
    found = {}
    for path in ("/proc/self/smaps_rollup", "/proc/self/status"):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                found[name] = int(rest.split()[0]) / 1024
    # The rest are pages of files, which all who map a file have in common; "clean" and "dirty" tell what was written to disk.
    own, held = found["Anonymous"], found["Rss"]
    return {"held": held, "own": own, "of files": held - own, "peak": found["VmHWM"]}


def one(name: str, folder: Path, threads: int, width: int) -> dict[str, float]:
    """Load in this process; figures of memory are beyond what it held after its imports."""
    prepare, _, options = WAYS[name]
    load, call = prepare(folder, threads, width, **options)
    before, begin = memory(), time.perf_counter()
    loaded = load()
    seconds, after = time.perf_counter() - begin, memory()
    begin = time.perf_counter()
    call(loaded)
    first, last = time.perf_counter() - begin, memory()
    begin = time.perf_counter()
    call(loaded)
    each = time.perf_counter() - begin
    found = {"load s": seconds, "first call ms": 1e3 * first, "second call ms": 1e3 * each}
    found |= {f"{what} MiB, loaded": after[what] - before[what] for what in ("held", "own", "of files")}
    found |= {f"{what} MiB, called": last[what] - before[what] for what in ("held", "own", "of files")}
    return found | {"peak MiB": last["peak"] - before["held"]}


def nbytes(path: Path) -> int:
    """Bytes of a file, or of the model in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("model.onnx*"))


def in_process(what: str, arguments: list[Any], threads: int) -> str:
    """Run this module again; gives the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks.load_onnx", "--do", json.dumps([what, *map(str, arguments)])]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        raise SystemExit(f"{what}: {(done.stderr.strip().splitlines() or ['it failed without a word'])[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def main(arguments: list[str] | None = None) -> int:
    """Make the files, load them each way, print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_onnx", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--megabytes", type=int, default=1024, help="of the weights in float32, MiB")
    parser.add_argument("--recipe", default="dense", help="what the exported weights become")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way")
    parser.add_argument("--folder", type=Path, help="keep what is made there, and take what is there already")
    parser.add_argument("--only", default="", metavar="REGEX", help="ways whose name matches")
    parser.add_argument("--do", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.do:
        what, folder, *rest = given.do
        if what == "make":
            make(Path(folder), int(rest[0]), rest[1])
        else:
            print(json.dumps(one(what, Path(folder), int(rest[0]), int(rest[1]))))
        return 0
    names = [name for name in WAYS if re.search(given.only, name)]
    with tempfile.TemporaryDirectory(prefix="recast-load-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "artifact").is_dir():
            in_process("make", [folder, given.megabytes, given.recipe], given.threads)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(given.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                print(f"round {number + 1}: {name}", file=sys.stderr)
                line = in_process(name, [folder, given.threads, sizes(given.megabytes)[1]], given.threads)
                samples[name].append(json.loads(line))
        rows = []
        for name in names:
            size = nbytes(folder / WAYS[name][1]) / 2**20
            row = {key: statistics.median(sample[key] for sample in samples[name]) for key in samples[name][0]}
            row["peak MiB"] = max(sample["peak MiB"] for sample in samples[name])
            rows.append({"name": name, "file MiB": size, **row, "peak / file": row["peak MiB"] / size})
    for row in rows:
        print(row["name"], {key: round(value, 2) for key, value in row.items() if key != "name"})
    if given.json:
        settings = {key: getattr(given, key) for key in ("megabytes", "recipe", "threads", "rounds")}
        whole = {"benchmark": "load_onnx", "settings": settings, "cores": os.cpu_count(), "rows": rows}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
