"""One fit, or a peer's, in a process of its own: seconds, peak memory, error. Prints JSON.

python -m benchmarks.fit_time_one "int4 + data" 1024 1024 2 [FOLDER]

A fit that takes less than a second is timed five times, and the median counts.
What all fits of a shape have in common, the statistics of its inputs, is kept in FOLDER: for 11008 inputs it takes half a minute.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fit_time_rows import BASELINE, COPY, PEERS, split

PAGE = 4096
# Fits of fewer seconds than this are timed so often.
BRIEF, SAMPLES = 1.0, 5
Fit = Callable[[Tensor, Any, Tensor], Any]  # of a weight, its statistics, and the inputs


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result, seconds, and the most that was resident meanwhile less what was before."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work()
        seconds = time.perf_counter() - start
        peak = max(peak, resident())
    finally:
        done.set()
        watcher.join()
    return result, seconds, max(0, peak - before)


def median_of(work: Callable[[], Any], first: float) -> tuple[float, int]:
    """Median seconds of a few calls, and how many, where the first took less than a second: one alone says little."""
    samples = [first]
    while first < BRIEF and len(samples) < SAMPLES:
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples), len(samples)


def run_one(what: str, m: int, n: int, threads: int, folder: Path | None = None) -> dict[str, Any]:
    """Fit one weight; what several fits of its shape need is kept in a folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight = torch.randn(m, n) / n**0.5
    # Few directions carry most of the data, as in a network; half as many tokens as features is a hard case.
    inputs = torch.randn(n // 2, n) * torch.logspace(0, -2, n)
    if what in PEERS:
        missing = [module for module in PEERS[what] if importlib.util.find_spec(module) is None]
        if missing:
            return {"absent": f"{', '.join(missing)} not installed"}
        return _peer(what, weight, inputs)
    return _ours(what, weight, inputs, folder)


def _statistics(weight: Tensor, inputs: Tensor, folder: Path | None) -> Any:
    """Of the inputs, with a sample of them; from the folder where it has them."""
    from safetensors.torch import load_file, save_file

    from recast.passes.forms import Stats

    names = ("gram", "mean", "absmax", "sizes")
    file = None if folder is None else folder / f"{weight.shape[0]}x{weight.shape[1]}.safetensors"
    if file is not None and file.is_file():
        held = {name: tensor.clone() for name, tensor in load_file(file).items()}
        sample = inputs[:: max(1, len(inputs) // 256)][:256]
        return Stats(held["gram"], held["mean"], held["absmax"], len(inputs), sample, sizes=held["sizes"])
    stats = Stats.from_inputs(inputs, sample=256)
    if file is not None:
        save_file({name: getattr(stats, name).contiguous() for name in names}, file)
    return stats


def _errors(weight: Tensor, dense: Tensor, inputs: Tensor | None) -> tuple[float, float | None]:
    """Relative errors of a weight and of its outputs, in float32: in float64 they would take longer than most fits."""
    gap = weight - dense
    plain = float(gap.norm() / weight.norm())
    return plain, None if inputs is None else float((inputs @ gap.T).norm() / (inputs @ weight.T).norm())


def _ours(what: str, weight: Tensor, inputs: Tensor, folder: Path | None) -> dict[str, Any]:
    from recast.passes.forms import Form, Stats, forms
    from recast.passes.forms.shared import divided

    forms()
    text, data = split(what)
    form = Form.parse(text)
    stats = None
    if data:
        stats = _statistics(weight, inputs, folder)
        rows, columns = torch.rand(len(weight), dtype=torch.float64), torch.rand(weight.shape[1], dtype=torch.float64)
        stats = replace(stats, row_importance=rows, column_importance=columns)
    # What the first call alone pays (thread pools, imports of scipy) is no part of it.
    small = torch.randn(256, 256)
    torch.linalg.svd(small, full_matrices=False)
    Form.parse("low_rank(32) | int4(rounding='gptq')").fit(small, Stats.from_inputs(small))
    weights = [weight]
    if form.shared_part is not None:
        weights.append(torch.randn_like(weight) / weight.shape[1] ** 0.5)
    settings = [stats] * len(weights)
    operators, seconds, peak = timed(lambda: form.fit_together(weights, settings))
    seconds, samples = median_of(lambda: form.fit_together(weights, settings), seconds)
    error, output = _errors(weight, operators[0].to_dense(), inputs if data else None)
    return {
        "seconds": seconds,
        "samples": samples,
        "peak_bytes": peak,
        "weight_bytes": weight.nbytes,
        "matrices": len(weights),
        "bytes_after": divided(operators)[0],
        "weight_error": error,
        "output_error": output,
    }


def _peer(what: str, weight: Tensor, inputs: Tensor) -> dict[str, Any]:
    prepare = {BASELINE: _svd, COPY: _copy, "torch": _svd_lowrank, "sci": _scikit, "onn": _onnxruntime, "nnc": _nncf}
    work = prepare[what if what in prepare else "torch" if what.startswith("torch") else what[:3]](what, weight, inputs)
    dense, seconds, peak = timed(work)
    seconds, samples = median_of(work, seconds)
    found: dict[str, Any] = {"seconds": seconds, "samples": samples, "peak_bytes": peak, "weight_bytes": weight.nbytes}
    if isinstance(dense, Tensor):
        gap = (weight - dense).double()
        found["weight_error"] = float(gap.norm() / weight.double().norm())
        found["output_error"] = float((inputs.double() @ gap.T).norm() / (inputs @ weight.T).double().norm())
    return found


def _svd(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    torch.linalg.svd(torch.randn(256, 256), full_matrices=False)
    return lambda: torch.linalg.svd(weight, full_matrices=False) and None


def _copy(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    return weight.clone


def _svd_lowrank(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    def work() -> Tensor:
        u, s, v = torch.svd_lowrank(weight, q=512, niter=2)
        return (u * s) @ v.T

    return work


def _scikit(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    from sklearn.utils.extmath import randomized_svd

    def work() -> Tensor:
        u, s, vt = randomized_svd(weight.numpy(), 512, random_state=0)
        return torch.from_numpy((u * s) @ vt)

    return work


def _onnxruntime(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    import numpy as np
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    n, m = weight.shape[1], weight.shape[0]
    blocks = -(-n // 128)
    array = np.ascontiguousarray(weight.numpy().T)  # (inputs, outputs), as MatMulNBits wants it
    packed = np.zeros((m, blocks, 64), dtype=np.uint8)
    scales = np.zeros(m * blocks, dtype=np.float32)
    zeros = np.zeros(m * ((blocks + 1) // 2), dtype=np.uint8)

    def work() -> None:
        quantize_matmul_4bits(packed, array, scales, zeros, 128, m, n, True)

    return work


def _nncf(what: str, weight: Tensor, inputs: Tensor) -> Callable[[], Any]:
    import logging

    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    model = openvino.convert_model(linear.eval(), example_input=inputs[:2])
    tokens = [inputs[i : i + 128].numpy() for i in range(0, len(inputs), 128)]
    data = {"dataset": nncf.Dataset(tokens), "gptq": True} if "gptq" in what else {}

    def work() -> None:
        mode = nncf.CompressWeightsMode.INT4_SYM
        nncf.compress_weights(model, mode=mode, group_size=128, ratio=1.0, all_layers=True, **data)

    return work


if __name__ == "__main__":
    print(json.dumps(run_one(sys.argv[1], *(int(number) for number in sys.argv[2:5]), *map(Path, sys.argv[5:6]))))
