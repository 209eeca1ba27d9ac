"""A Llama-shaped decoder generating at batch 1 on a CPU: recast's ONNX export beside onnxruntime-genai and torch.compile.

Every contestant runs in a process of its own, a fresh one each round, in turns: nobody shares a session, threads or memory with
another. Figures: seconds to load, milliseconds to the first token of a prompt, tokens a second after it, processor time of all threads
(which other programs hardly disturb; read it with one thread, as threads that wait count), peak memory of the process (and what it
held after its imports), and the bytes that a token reads over the measured bandwidth of memory, which weights that fit into a cache
can beat.

    python -m benchmarks.decoder_processes --json FILE [--layers 16] [--width 2048] [--vocabulary 30000] [--prompt 128] [--tokens 64]
        [--threads 2] [--rounds 5] [--folder DIR] [--only REGEX]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.decoder_processes_one import WAYS

_SETTINGS = {"layers": 16, "width": 2048, "vocabulary": 30000, "prompt": 128, "tokens": 64, "threads": 2}
_LOOKED_UP = {"Gather", "GatherBlockQuantized", "Shape", "Reshape"}  # read a row, or nothing, of what they take


def bandwidth(threads: int, mebibytes: int = 256, rounds: int = 10) -> float:
    """Bytes a second that a copy reads and writes, the best of a few."""
    import torch

    torch.set_num_threads(threads)
    source = torch.ones(mebibytes << 18)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def weights_of(folder: Path) -> tuple[int, int]:
    """Bytes of all weights of a model.onnx, and of those that each token reads whole."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    sizes = {t.name: _nbytes(t) for t in graph.initializer}
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    # A table of a rotation is read a row at a time, too.
    read = [n for n in sizes if not users.get(n, set()) <= _LOOKED_UP and not ("cos" in n or "sin" in n)]
    return sum(sizes.values()), sum(sizes[name] for name in read)


def _nbytes(tensor: Any) -> int:
    import math

    import onnx

    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    each = bits.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * each // 8


def cache_bytes(settings: Mapping[str, int]) -> int:
    """Keys and values of all layers, in float32, when the last token is written."""
    heads = max(1, settings["width"] // 256)
    return settings["layers"] * 2 * heads * 64 * 4 * (settings["prompt"] + settings["tokens"])


def dense_bytes(settings: Mapping[str, int]) -> int:
    """Of the matrices that a token is multiplied with, in float32."""
    width, inner = settings["width"], 11 * settings["width"] // 4 // 64 * 64
    layer = 2 * width * width + 2 * width * max(1, width // 256) * 64 + 3 * width * inner
    return 4 * (settings["layers"] * layer + settings["vocabulary"] * width)


def call(what: str, way: str, folder: Path, settings: Mapping[str, int]) -> str:
    """Run `decoder_processes_one`; gives the last line that it prints, raises RuntimeError with its last complaint."""
    command = [sys.executable, "-m", "benchmarks.decoder_processes_one", what, way, str(folder), json.dumps(settings)]
    threads = {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed without a word"])[-1])
    return (done.stdout.strip().splitlines() or [""])[-1]


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds; the largest peak."""
    found = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    found["peak MiB"] = max(sample["peak MiB"] for sample in samples)
    found["tokens a second"] = 1 / found["each token"]
    return found


def row_of(
    name: str, samples: list[dict[str, float]], folder: Path, settings: Mapping[str, int], speed: float
) -> dict[str, Any]:
    """Figures of a contestant, beside the least that memory allows."""
    own = folder / "".join(c if c.isalnum() else "_" for c in name)
    onnx_file = (own / "model.onnx").is_file()
    if onnx_file:
        held, read = weights_of(own)
    else:
        way = WAYS.get(name, {})
        wide = 2 if way.get("dtype") == "bfloat16" else 4
        # Of a backend's forms their bits count, and a scale of 32 bits in each group of 128.
        read = int(dense_bytes(settings) * ((4 + 32 / 128) / 32 if "recast" in way else wide / 4))
        held = read + wide * settings["vocabulary"] * settings["width"]
    cache, found = cache_bytes(settings), summary(samples)
    floor = (read + cache) / speed
    return {
        "name": name, "weights MiB": held / 2**20, "read a token MiB": (read + cache) / 2**20,
        "load s": found["load"], "first token ms": 1e3 * found["first token"], "each token ms": 1e3 * found["each token"],
        "processor, two tokens ms": 1e3 * found["processor, two tokens"],
        "processor, each token ms": 1e3 * found["processor, each token"],
        "tokens a second": found["tokens a second"], "times the floor": found["each token"] / floor,
        "peak MiB": found["peak MiB"], "imported MiB": found["imported MiB"],
        "peak / (weights + cache)": found["peak MiB"] * 2**20 / (held + cache),
        "peak without imports / (weights + cache)": (found["peak MiB"] - found["imported MiB"]) * 2**20 / (held + cache),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Make everybody's files, run rounds, print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_processes", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    for name, value in {**_SETTINGS, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="keep what is made there, and take what is there already")
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants whose name matches")
    given = parser.parse_args(arguments)
    settings = {name: getattr(given, name) for name in _SETTINGS}
    names = [name for name in WAYS if re.search(given.only, name)]
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "saved" / "config.json").is_file():
            call("make", "saved", folder, settings)
        for name in list(names):
            own = folder / "".join(c if c.isalnum() else "_" for c in name)
            if WAYS[name]["kind"] == "genai" and importlib.util.find_spec("onnxruntime_genai") is None:
                absent[name] = "onnxruntime-genai is not installed"
            elif not own.is_dir():
                print(f"making {name}", file=sys.stderr)
                try:
                    call("make", name, folder, settings)
                except RuntimeError as error:
                    absent[name] = str(error)
        names = [name for name in names if name not in absent]
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        speeds = []
        for number in range(given.rounds):
            speeds.append(bandwidth(settings["threads"]))
            for name in names[number % len(names) :] + names[: number % len(names)]:
                print(f"round {number + 1}: {name}", file=sys.stderr)
                samples[name].append(json.loads(call("run", name, folder, settings)))
        rows = [row_of(name, samples[name], folder, settings, max(speeds)) for name in names]
    for row in rows:
        print(row["name"], {k: round(v, 3) for k, v in row.items() if k != "name"})
    for name, why in absent.items():
        print(f"{name}: absent, {why}")
    if given.json:
        whole = {
            "benchmark": "decoder_processes", "settings": settings, "copy GB/s": max(speeds) / 1e9, "cores": os.cpu_count(),
            "rows": rows, "absent": absent, "samples": samples,
        }  # fmt: skip
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
