"""Whether kernels say what they should on a device, each against its meaning in float64; `benchmarks.kernels_gpu` runs it.

    python -m benchmarks.kernels_gpu_check NAME [--device cpu] [--quick]     # one case, told as JSON

A result may differ by the rounding of its own dtype, once, and once more for each time that numbers are rounded on the way; the limit
is on the whole, ‖found - meant‖ / ‖meant‖, and on every number by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import without_paths
from recast.kernels.tiles import interpreting
from recast.kernels.timed import BenchCase, Prepared, cases

# Awkward sizes; and sizes that divide by 16, for which kernels are compiled as for the layers that are timed.
CHECKED = {(60, 577): (0, 1, 4, 5, 12, 20, 63, 130), (256, 4096): (1, 4, 16, 64, 256)}
QUICK_CHECKED = {(36, 100): (0, 1, 5)}
OTHERS = (5, 130)  # tokens at which the other dtypes are tried
GRADIENTS = 5
LIMIT = 180.0  # seconds of one case, compilations and all
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Gap:
    """How far a result is from its meaning: all of it, and the worst number, both relative to what rounding allows."""

    error: float
    worst: float
    limit: float

    @property
    def wrong(self) -> bool:
        return not (self.error <= self.limit and self.worst <= 1)


def step(dtype: torch.dtype) -> float:
    """What rounding to a dtype changes at most; products of float32 on matrix units come in three parts of ten bits.

    Triton's interpreter cuts off what does not fit into bfloat16 instead of rounding.
    """
    if dtype == torch.float32:
        return 2.0**-17
    return torch.finfo(dtype).eps / (1 if interpreting() and dtype == torch.bfloat16 else 2)


def gap(found: Tensor, meant: Tensor, roundings: int) -> Gap:
    """Compare, given how often numbers were rounded on the way."""
    limit = step(found.dtype) * (1 + roundings)
    if found.shape != meant.shape:
        return Gap(math.inf, math.inf, limit)
    if not found.numel():
        return Gap(0.0, 0.0, limit)
    difference, size = (found.double() - meant).abs(), meant.square().mean().sqrt()
    # Errors of what came before spread over the sum like a random walk; four times its length is what none exceeds.
    allowed = step(found.dtype) * meant.abs() + 4 * limit * size + torch.finfo(torch.float64).tiny
    error, worst = difference.square().mean().sqrt() / size, (difference / allowed).max()
    told = [float(value) if math.isfinite(float(value)) else math.inf for value in (error, worst)]
    return Gap(*told, limit)


def checked(case: BenchCase, device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Check a case at awkward shapes, in all of its dtypes, with gradients; whatever fails is told, not raised."""
    torch.manual_seed(0)
    told: dict[str, Any] = {"case": case.name, "kernel": case.kernel, "peer": case.peer, "checks": 0, "failed": []}
    worst = 0.0
    for shape, counts in (QUICK_CHECKED if quick else CHECKED).items():
        rows, inputs = (-(-size // of) * of for size, of in zip(shape, case.multiples, strict=True))
        for dtype in case.dtypes:
            for tokens in counts:
                if dtype != case.dtypes[0] and tokens not in OTHERS:
                    continue
                if not case.tokens[0] <= tokens <= case.tokens[1] and (case.peer or tokens):
                    continue
                if case.peer and not tokens:
                    continue
                about = f"{rows}x{inputs}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
                try:
                    found = _compare(case, rows, inputs, dtype, tokens, device)
                except Exception as error:  # noqa: BLE001  (a kernel that fails is what this looks for)
                    told["failed"].append(f"{about}: {without_paths(error)}")
                    if case.peer:  # one reason is enough
                        return told
                    continue
                for what, one in found.items():
                    told["checks"] += 1
                    worst = max(worst, one.error / one.limit, one.worst)
                    if one.wrong:
                        told["failed"].append(f"{about}: {what} off by {one.error:.2g}, {one.limit:.2g} allowed")
    return told | {"worst": worst if math.isfinite(worst) else None}


def _compare(
    case: BenchCase, rows: int, inputs: int, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, Gap]:
    prepared = case.prepare(rows, inputs, dtype, device)
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    if not case.peer:  # between numbers that spoil what reads them
        x = torch.full((tokens, inputs + 48), float("nan"), dtype=dtype, device=device)[:, 16 : 16 + inputs].copy_(x)
    meant = prepared.meant(wide(prepared), x.double())
    found = {}
    for name, run in {"result": prepared.run, **prepared.ways}.items():
        unwritten = torch.full((tokens, rows), float("nan"), dtype=dtype, device=device)
        del unwritten  # the allocator hands this memory out next
        found[name] = gap(run(prepared.held, x), meant, case.roundings)
    if case.gradients and tokens == GRADIENTS and not case.peer:
        found |= _gradients(prepared, x, case.roundings)
    return found


def wide(prepared: Prepared) -> dict[str, Tensor]:
    """Tensors with what is learned in float64."""
    return {name: t.double() if name in prepared.learned else t for name, t in prepared.held.items()}


def _gradients(prepared: Prepared, x: Tensor, roundings: int) -> dict[str, Gap]:
    """Of x and of what is learned, for a random gradient of the result."""

    def leaves(held: Mapping[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        learned = {name: held[name].detach().requires_grad_() for name in prepared.learned}
        return {**held, **learned}, x.detach().requires_grad_()

    held, narrow = leaves(prepared.held, x)
    y = prepared.run(held, narrow)
    back = torch.randn(y.shape, device=y.device).to(y.dtype)
    y.backward(back)
    wider, exact = leaves(wide(prepared), x.double())
    prepared.meant(wider, exact).backward(back.double())
    pairs = {"gradient of x": (narrow.grad, exact.grad)}
    pairs |= {f"gradient of {name}": (held[name].grad, wider[name].grad) for name in prepared.learned}
    # The way back has as many products, and the vectors it meets were rounded on the way there.
    return {
        name: Gap(math.inf, math.inf, 0.0) if a is None or b is None else gap(a, b, 2 * roundings + 2)
        for name, (a, b) in pairs.items()
    }


def in_process(case: BenchCase, left: float, *, quick: bool) -> dict[str, Any] | None:
    """Check a case in a process of its own: one that spoils the device spoils that alone. None if `left` seconds do not do."""
    about: dict[str, Any] = {"case": case.name, "kernel": case.kernel, "peer": case.peer, "checks": 0}
    command = [sys.executable, "-m", "benchmarks.kernels_gpu_check", case.name, *["--quick"] * quick]
    limit = min(LIMIT, left)
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return None if limit < LIMIT else about | {"failed": [f"not done after {limit:.0f} seconds"]}
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        return about | {"failed": [re.sub(r"(?:/[\w.+-]+)+/", "", why)[:300]]}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def told(found: Gap) -> dict[str, Any]:
    """As rows have it; None stands for what is not finite."""
    figures = {k: float(f"{v:.3g}") if math.isfinite(v) else None for k, v in asdict(found).items()}
    return {**figures, "wrong": found.wrong}


def within(row: Mapping[str, Any]) -> bool:
    """Whether a row's gap is what rounding allows."""
    error, worst = row["error"], row["worst"]
    return error is not None and worst is not None and not Gap(error, worst, row["limit"]).wrong


def main() -> None:
    """Check one case and tell it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    case = next(case for case in cases() if case.name == given.name)
    print(json.dumps(checked(case, torch.device(given.device), quick=given.quick)))


if __name__ == "__main__":
    main()
