"""The dense products that `benchmarks.kernels_gpu` compares with, and what rows of the others depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import recast.kernels
from benchmarks.kernels_gpu_marks import DENSE, TUNED
from recast.kernels.timed import BenchCase, Prepared, moved


def dense_cases() -> list[BenchCase]:
    """The dense product, as it is and as torch.compile tunes it."""

    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        weight = (torch.randn(rows, inputs, device=device) / inputs**0.5).to(dtype)
        held = {"weight": weight}

        def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, given["weight"])

        def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return x @ given["weight"].double().T

        return Prepared(held, run, meant, moved(held, rows, inputs))

    tuned = "max-autotune-no-cudagraphs"
    return [
        BenchCase(n, "dense", prepare, peer=True, compiled=c, timed=False) for n, c in ((DENSE, ""), (TUNED, tuned))
    ]


def triton_version() -> dict[str, str]:
    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def source_of(kernel: str) -> str:
    """Hash of a kernel's folder and of all files of `recast.kernels` that its files name; nothing for what is not ours.

    Examples
    --------
    >>> source_of("") == "", source_of("sparse_matmul") != source_of("gated_matmul")
    (True, True)
    """
    if not kernel:
        return ""
    root = Path(next(iter(recast.kernels.__path__)))
    waiting, seen = sorted((root / kernel).glob("*.py")), dict[Path, bytes]()
    while waiting:
        file = waiting.pop()
        if file in seen or file.name == "resources.py":
            continue
        seen[file] = file.read_bytes()
        for name in re.findall(r"recast\.kernels\.([\w.]+)", seen[file].decode()):
            place = root.joinpath(*name.strip(".").split("."))
            waiting += [f for f in (place.with_suffix(".py"), *place.glob("*.py")) if f.is_file()]
    return hashlib.sha256(b"".join(seen[file] for file in sorted(seen))).hexdigest()[:16]
