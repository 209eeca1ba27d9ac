"""The kind of a mask is what it leaves to each query, not how it is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import recast
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite
from tests.patterns.test_attention_spelled import Block

Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
FAR = -torch.inf

KINDS: dict[str, tuple[Mask, str]] = {
    "causal": (lambda s, i, j: s.masked_fill(j > i, FAR), "causal"),
    "negated": (lambda s, i, j: torch.where(~(j > i), s, FAR), "causal"),
    "triangle": (lambda s, i, j: s + torch.triu(torch.full(s.shape[-2:], FAR), 1), "causal"),
    "window": (lambda s, i, j: s.masked_fill((j > i) | (i - j >= 3), FAR), "sliding"),
    "window in two steps": (lambda s, i, j: s.masked_fill(j > i, FAR).masked_fill(i - j >= 3, FAR), "sliding"),
    "window longer than the example": (lambda s, i, j: s.masked_fill((j > i) | (i - j >= 300), FAR), "sliding"),
    "the future alone": (lambda s, i, j: s.masked_fill(j < i, FAR), "boolean"),
    "prefix": (lambda s, i, j: s.masked_fill((j > i) & (j >= 3), FAR), "boolean"),
    "two ahead": (lambda s, i, j: s.masked_fill(j > i + 2, FAR), "boolean"),
    "dilated": (lambda s, i, j: s.masked_fill((j > i) | ((i - j) % 2 == 1), FAR), "boolean"),
    "chunks": (lambda s, i, j: s.masked_fill((j > i) | (i // 3 != j // 3), FAR), "boolean"),
    "chunks longer than the example": (lambda s, i, j: s.masked_fill((j > i) | (i // 30 != j // 30), FAR), "boolean"),
    "multiplied": (lambda s, i, j: s * (j <= i).double() - 1e9 * (1 - (j <= i).double()), "unknown"),
}


@pytest.mark.parametrize("mask", list(KINDS))
def test_what_a_mask_leaves(mask: str) -> None:
    written, kind = KINDS[mask]

    class Masked(Block):
        def score(self, q: Tensor, k: Tensor) -> Tensor:
            places = torch.arange(q.shape[2])
            return written(q @ k.mT, places[:, None], places[None])

    program = recast.capture(Masked().double().eval(), (torch.randn(2, 6, 20).double(),))
    (site,) = [s for s in recognise(program).sites if isinstance(s, AttentionSite)]
    assert site.mask == kind
