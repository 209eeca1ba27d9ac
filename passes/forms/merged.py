"""A few matrices in place of many: those that act alike become one."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import gram_root, solve_consistent
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.shared import SharedForm, pooled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Merged"]

# Outputs on so many combinations of inputs tell matrices apart; distances are right within a few percent.
_PROBES = 256
_SEED = 0
# Rows of a weight that are converted to float64 at once.
_ROWS = 512


@dataclass(frozen=True)
class Merged(SharedForm):
    """W_i ≈ C_k(i): the matrices of a group, the experts of a mixture above all, in few clusters that hold one matrix each.

    Matrices are clustered by their outputs on what all of them take in (Ward's criterion), and those of a cluster replaced by
    ``C = (Σ W_i G_i)(Σ G_i)⁻¹``, G_i the Gram matrix of what flows into W_i itself: the least squares for all of
    them, in which an expert that is asked often counts often. Without data C is their mean. A router stays as it is: the
    probabilities of experts that hold one matrix add up by themselves. A group of no more matrices than `count` keeps them.

    Notes
    -----
    Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging (2025) clusters by outputs, too (k-means),
    and merges by one SVD of ``[W_1 | W_2 | ...] = U Σ [V_1 | V_2 | ...]``, weighting the V_i by how often each expert is
    asked. Untruncated that is the mean of the W_i with these weights; the least squares of the data take its place here.
    gate, up and down of an expert are clustered each for itself.

    Examples
    --------
    >>> a, b = torch.randn(6, 4), torch.randn(6, 4)
    >>> made = Merged(2).fit_together([a, b, a + 0.01, b], [None] * 4)
    >>> made[0].weight is made[2].weight, made[0].weight is made[1].weight
    (True, False)
    >>> torch.testing.assert_close(made[0].to_dense(), a + 0.005)
    """

    name: ClassVar[str] = "merged"
    summary: ClassVar[str] = "matrices that act alike, experts above all, become one (Sub-MoE)"

    count: int = field(metadata={"help": "matrices that are left of a group"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise FormError(f"{self.name}: count is {self.count}, not positive; half of the experts is a start")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(1), cls(2)]

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        return Dense(torch.empty(shape, dtype=dtype, device="meta"))

    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        labels = _clusters(weights, stats, self.count)
        made: dict[int, Dense] = {}
        for label in labels:
            if label not in made:
                own = [i for i, other in enumerate(labels) if other == label]
                made[label] = Dense(_merged([weights[i] for i in own], [stats[i] for i in own]))
        return [made[label] for label in labels]


def _clusters(weights: Sequence[Tensor], stats: Sequence[Stats | None], count: int) -> list[int]:
    """The number of each matrix's cluster, at most `count` of them."""
    if len(weights) <= count:
        return list(range(len(weights)))
    if count == 1:
        return [1] * len(weights)
    together = pooled(stats)
    gram = None if together is None else together.gram
    n = weights[0].shape[1]
    generator = torch.Generator().manual_seed(_SEED)
    if n <= _PROBES and gram is None:
        probes = torch.eye(n, dtype=torch.float64)
    else:
        # E |W p|² is |W X|² for p with the covariance of X.
        probes = torch.randn(n, min(n, _PROBES), generator=generator, dtype=torch.float64)
    if gram is not None:
        probes = gram_root(gram.double().cpu()) @ probes
    seen = np.stack([(weight.detach().cpu().double() @ probes).numpy().ravel() for weight in weights])
    from scipy.cluster import hierarchy  # here: it takes long to import

    found: list[int] = hierarchy.fcluster(hierarchy.linkage(seen, "ward"), count, "maxclust").tolist()
    return found


def _merged(weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> Tensor:
    """The one matrix that stands for some under their data, in their dtype."""
    if len(weights) == 1:
        return weights[0].clone()
    total = torch.zeros_like(weights[0], dtype=torch.float64)
    for weight in weights:
        total += weight
    mean = total / len(weights)
    if any(known is None or known.gram is None for known in stats):
        return mean.to(weights[0].dtype)
    # From the mean, which inputs that the data never shows keep.
    grams = torch.zeros(mean.shape[1], mean.shape[1], dtype=torch.float64, device=mean.device)
    moved = torch.zeros_like(mean)
    for weight, known in zip(weights, stats, strict=True):
        assert known is not None
        assert known.gram is not None
        gram = known.gram.to(mean.device, torch.float64)
        grams += gram
        for some, middle, out in zip(*(torch.split(t, _ROWS) for t in (weight, mean, moved)), strict=True):
            out.addmm_(some.double() - middle, gram)
    return mean.add_(solve_consistent(moved, grams)).to(weights[0].dtype)
