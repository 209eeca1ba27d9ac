"""Half of the inputs of each token: above a threshold (TEAL), or the largest by number (WINA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from recast.kernels.gated_matmul.gated_op import columns_matmul, gate_cuts
from recast.kernels.gated_matmul.launch import FEW
from recast.kernels.gated_matmul.reference import cuts_of, gated
from recast.kernels.roofline import Work
from recast.kernels.timed import BenchCase, Prepared

__all__ = ["cases"]

# Half of the numbers of a normal distribution are nearer to zero.
_MEDIAN = 0.6744897501960817


def cases() -> Iterator[BenchCase]:
    """Both gates; x is drawn from a normal distribution."""
    yield BenchCase("teal 50 %", "gated", _prepare(weighted=False), compiled="default")
    yield BenchCase("wina 50 %", "gated", _prepare(weighted=True), compiled="default")


def _prepare(*, weighted: bool) -> Callable[[int, int, torch.dtype, torch.device], Prepared]:
    def prepare(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Prepared:
        held = {"columns": (torch.randn(inputs, rows, device=device) / inputs**0.5).to(dtype)}
        if weighted:
            held["norms"] = torch.rand(inputs, device=device) + 0.5
        kept = max(1, inputs // 2)

        def run(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            norms = given.get("norms")
            cut = gate_cuts(x.detach(), norms, kept) if weighted else _MEDIAN
            y: Tensor = columns_matmul(gated(x, norms, cut, strictly=not weighted), given["columns"], None)
            return y

        def meant(given: Mapping[str, Tensor], x: Tensor) -> Tensor:
            """Scores are compared in float32, as they are where x comes in fewer bits."""
            narrow, norms = x.detach().float(), given.get("norms")
            cut = cuts_of(narrow, norms, kept).unsqueeze(-1) if weighted else _MEDIAN
            scores = narrow.abs() if norms is None else narrow.abs() * norms
            wanted = scores >= cut if weighted else scores > cut
            return (x * wanted) @ given["columns"].double()

        def work(tokens: int) -> Work:
            # A column is read if any of the tokens wants it; more than a few tokens read all of them.
            share = 1 - 0.5**tokens if tokens <= FEW else 1.0
            weights = int(share * rows * inputs)
            return Work(2 * weights + 2 * tokens * (rows + inputs), 2 * tokens * weights)

        return Prepared(held, run, meant, work)

    return prepare
