"""Times of contestants on a device, side by side: copies of weights in turns, CUDA graphs, rounds in which everybody takes part."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import without_paths
from recast.kernels.roofline import Work, device_named
from recast.kernels.timed import Prepared, Run

ROUNDS, SAMPLE = 15, 2e-3  # seconds of a sample, at least
GRAPHED = 1024  # tokens up to which calls are captured: beyond, a call takes longer than its launch
HOPELESS, FEW_ROUNDS = 20, 2  # who is so many times slower than the baseline runs in the first rounds only
CALLS = 512


class Clock:
    """Wall-clock time of calls on a CPU; `Cuda` times those on a GPU."""

    cache = 0
    device = torch.device("cpu")
    sample = 0.0

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def captured(self, call: Callable[[], object], tokens: int) -> tuple[Callable[[], object], str]:
        """A call to be timed, and how it runs."""
        return call, "calls"

    def wait(self) -> None:
        """Wait until all that was called has run; raises what went wrong there."""

    def facts(self) -> dict[str, Any]:
        return {}

    def floor(self, work: Work) -> float | None:
        """The seconds below which work cannot be done, where the device's figures are known."""
        return None

    def compiled(self, run: Run, mode: str) -> Run:
        return run


class Cuda(Clock):
    """CUDA events around calls, or around replays of a graph of them."""

    device = torch.device("cuda")
    sample = SAMPLE

    def __init__(self) -> None:
        import torch._dynamo

        properties = torch.cuda.get_device_properties(self.device)
        self.cache = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self._figures = device_named(torch.cuda.get_device_name())
        # A shape is a compilation of its own here; past the limit a compiled function would run as it is.
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            if hasattr(torch._dynamo.config, limit):
                setattr(torch._dynamo.config, limit, 4096)

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def captured(self, call: Callable[[], object], tokens: int) -> tuple[Callable[[], object], str]:
        if tokens > GRAPHED:
            return call, "calls"
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
            graph.replay()
            self.wait()
        except Exception as error:  # noqa: BLE001  (not everything can be captured; what is left is timed with its launches)
            torch.cuda.set_stream(stream)  # a capture that breaks off may leave its own
            self.wait()
            return call, f"calls, as no graph takes it ({without_paths(error)})"
        return graph.replay, "graph"

    def wait(self) -> None:
        torch.cuda.synchronize()

    def floor(self, work: Work) -> float | None:
        known = self._figures is not None and work.rate in self._figures.rates
        return self._figures.floor(work) if known and self._figures else None

    def compiled(self, run: Run, mode: str) -> Run:
        # One compilation for all layers and tokens, unless the mode tunes for each.
        found: Run = torch.compile(run, mode=mode, dynamic=mode == "default", fullgraph=True)
        return found

    def facts(self) -> dict[str, Any]:
        """The device, its settings, and what it reaches here: a large copy and a large product."""
        properties = torch.cuda.get_device_properties(self.device)
        found: dict[str, Any] = {
            "capability": list(torch.cuda.get_device_capability()),
            "memory": properties.total_memory,
            "cache": self.cache,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        if shutil.which("nvidia-smi"):
            asked = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
            )
            if told.returncode == 0:
                values = told.stdout.strip().splitlines()[0].split(", ")
                found |= dict(zip(asked.split(","), values, strict=False))
        source = torch.randn(1 << 29, device=self.device)  # 2 GiB
        copy = [self.seconds(source.clone) for _ in range(7)]
        found["copied bytes a second"] = round(2 * source.nbytes / statistics.median(copy), -9)
        del source
        a, b = (torch.randn(8192, 8192, device=self.device).bfloat16() for _ in range(2))
        product = [self.seconds(lambda: a @ b) for _ in range(9)]
        found["bf16 operations a second"] = round(2 * 8192**3 / statistics.median(product), -12)
        return found


@dataclass
class Turn:
    """A contestant that is ready: `call` makes so many calls."""

    name: str
    call: Callable[[], object]
    calls: int
    how: str
    samples: list[float] = field(default_factory=list)  # seconds of one call, one a round

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def copies(prepared: Prepared, cache: int) -> list[Mapping[str, Tensor]]:
    """A weight and copies of it, together four times what the cache holds."""
    nbytes = prepared.work(0).bytes if prepared.again else sum(t.nbytes for t in prepared.held.values())
    more = max(0, math.ceil(4 * cache / max(1, nbytes)) - 1)
    again = prepared.again or (lambda: {name: tensor.clone() for name, tensor in prepared.held.items()})
    return [prepared.held, *(again() for _ in range(min(more, 127)))]


def turn(name: str, run: Run, held: Sequence[Mapping[str, Tensor]], x: Tensor, clock: Clock) -> Turn:
    """Warm up, count how many calls a sample takes, and capture them; raises what the contestant raises."""
    waiting = itertools.cycle(held)

    def calls(count: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                run(next(waiting), x)

        return call

    once = calls(1)
    for _ in range(2):
        once()
    clock.wait()
    one = min(clock.seconds(once) for _ in range(2))
    # A graph goes through all copies, the same number of times; so do calls, over several samples.
    several = len(held) if x.shape[0] <= GRAPHED and clock.cache else 1
    call, how, count = once, "calls", 1
    for _ in range(2):
        count = several * math.ceil(min(CALLS, max(1.0, clock.sample / max(one, 1e-7))) / several)
        call, how = clock.captured(calls(count), x.shape[0])
        if how != "graph" or (one := clock.seconds(call) / count) * count > clock.sample / 2:
            break  # or what was counted was mostly launches
    return Turn(name, call, count, how)


def rounds(turns: Sequence[Turn], clock: Clock, count: int = ROUNDS) -> None:
    """Let everybody take a sample in every round, beginning with another one each time; the first is the baseline."""
    for one in turns:
        clock.seconds(one.call)
    waiting = list(turns)
    for number in range(count):
        if number == FEW_ROUNDS:
            limit = HOPELESS * turns[0].median
            waiting = [one for one in waiting if one.median <= limit]
        first = number % len(waiting)
        for one in waiting[first:] + waiting[:first]:
            one.samples.append(clock.seconds(one.call) / one.calls)


def figures(one: Turn, base: Turn) -> dict[str, Any]:
    """As rows have them: milliseconds, quartiles, and times the baseline's, each ratio within a round."""
    quartiles = statistics.quantiles(one.samples, n=4, method="inclusive") if len(one.samples) > 1 else one.samples * 3
    ratios = [a / b for a, b in zip(one.samples, base.samples, strict=False)]
    return {
        "milliseconds": float(f"{1e3 * quartiles[1]:.5g}"),
        "quartiles": [float(f"{1e3 * quartiles[i]:.5g}") for i in (0, 2)],
        "ratio": float(f"{statistics.median(ratios):.4g}"),
        "rounds": len(one.samples),
        "calls": one.calls,
        "how": one.how,
    }
