"""Statistics of inputs gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.passes.forms.stats import SIZES, Stats, sizes_of

__all__ = ["RunningStats"]


class RunningStats:
    """Statistics being gathered: one pass, memory bounded by the Gram matrix and a small sample."""

    def __init__(self, features: int, sample: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.lowest = torch.full((features,), torch.inf, dtype=torch.float64)
        self.highest = -self.lowest
        self.sizes = torch.zeros(SIZES, dtype=torch.int64)
        self.tokens = 0
        self.wanted = sample
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in vectors (..., n)."""
        vectors = x.detach().reshape(-1, x.shape[-1])
        for chunk in vectors.split(8192):  # type: ignore[no-untyped-call]  # bounds the float64 copy
            wide = chunk.double().cpu()
            self.gram.addmm_(wide.T, wide)
            self.total += wide.sum(0)
            self.sizes += sizes_of(wide)
            if len(wide):
                self.lowest = torch.minimum(self.lowest, wide.amin(0))
                self.highest = torch.maximum(self.highest, wide.amax(0))
        # An even sample of each batch, thinned so that all batches stay represented.
        step = max(1, len(vectors) // self.wanted)
        self.kept.append(vectors[::step][: self.wanted].cpu().clone())
        self.tokens += len(vectors)
        if sum(map(len, self.kept)) > 2 * self.wanted:
            self.kept = [_thin(torch.cat(self.kept), self.wanted)]

    def stats(self) -> Stats:
        """Return the statistics of all vectors so far."""
        sample = _thin(torch.cat(self.kept), self.wanted) if self.kept else None
        ranges = torch.stack((self.lowest, self.highest)) if self.tokens else torch.zeros(2, len(self.total)).double()
        mean, absmax = self.total / max(1, self.tokens), ranges.abs().amax(0)
        return Stats(self.gram, mean, absmax, self.tokens, sample, sizes=self.sizes, ranges=ranges)


def _thin(rows: Tensor, count: int) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).long()].clone()
