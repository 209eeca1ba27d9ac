"""Experts of fewer hidden features: those kept that give most, for each expert its own."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.operator import Dense
from recast.passes.forms.stats import Stats, row_errors, squared_error
from recast.passes.modules.block import Block
from recast.passes.modules.flow import Refused
from recast.passes.modules.form import Fit, Made, ModuleForm
from recast.passes.modules.mixture import Mixture
from recast.passes.modules.nystrom import on_features
from recast.patterns.errors import FormError

__all__ = ["Camera", "energies"]


@dataclass(frozen=True)
class Camera(ModuleForm):
    """``y_e = W_e z  ->  y_e = W_e' z_S``: each expert e keeps the hidden features S that carry most energy, k of them.

    The energy of feature c is ``‖W_e[:, c]‖² ((1 - α) Σ_t z_tc² + α max_t z_tc²)`` over the tokens t that visit the expert. W_e' is
    least squares on what is kept. An expert that no token of the data visits is judged by its weights alone, by the product of
    the norms of a feature's row of gate, its row of up and its column of down, and not solved anew. The error that is
    predicted is that of all experts' outputs before they are weighted.

    Notes
    -----
    Xu et al., CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis (arXiv 2508.02322),
    CAMERA-P, which has no fit (``refit=false``) and whose code sets features to zero. Where we differ: the features of each expert
    are ranked by themselves and all experts keep equally many, so that stacks of experts stay stacks; there all features of a
    layer, shared experts with them, are ranked together. Weights of the router do not enter the energy: statistics do not have
    them.

    Examples
    --------
    >>> Camera(0.75, round_to=8).width(100)
    72
    """

    name: ClassVar[str] = "camera"
    site_kind: ClassVar[str] = "moe"
    summary: ClassVar[str] = "fewer hidden features in each expert of a mixture"
    parts: ClassVar[str] = "all experts of a mixture (gate, up and down of each)"

    alpha: float = field(default=0.9, kw_only=True, metadata={"help": "share of the largest value in the energy"})
    refit: bool = field(default=True, kw_only=True, metadata={"help": "solve for the last matrix of each expert anew"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise FormError(f"{self.name}: alpha is {self.alpha}, not in [0, 1]; 0.9 would work")

    def solve_block(self, block: Block) -> Fit:
        if not isinstance(block, Mixture):
            raise Refused("it is no mixture of experts")
        block.check_readers()
        block.experts_way()
        width = block.width
        count = self.width(width)
        made: dict[str, Made] = {}
        stand_ins: dict[str, ColumnSparse] = {}
        total = _Errors()
        for expert, roles in enumerate(block.experts):
            stats, weight, labels = block.seen(expert, self), block.matrix(f"{expert}.down"), block.labels(expert)
            kept, solved = torch.arange(width), weight
            if count < width:
                if stats is not None:
                    scores = energies(weight, stats, self.alpha)
                else:
                    scores = _sizes(block, expert, labels)
                kept = scores.topk(count).indices.sort().values
                solved = weight[:, kept]
                if stats is not None and self.refit:
                    seen = stats.regular.gram
                    assert seen is not None
                    solved = on_features(weight, seen, kept)
            stand_in = ColumnSparse(Dense(solved.to(weight.dtype)), kept.to(torch.int32), width)
            total.add(weight, stand_in, stats)
            name = roles["down"].site.name
            stand_ins[name] = stand_in
            made[name] = Made(
                stand_in.values.to_dense(), stats=None if stats is None else stand_in.seen_by_values(stats)
            )
            for first, numbers in labels.items():
                role, own = block.role(expert, first), torch.isin(numbers, kept)
                bias = block.bias(role)
                made[first] = Made(block.matrix(role)[own], None if bias is None else bias[own], numbers)
        places = {name: block.place(block.linears[name]) for name in made}
        shape = (block.experts[0]["down"].site.out_features, width)
        return Fit(
            made, None, torch.arange(count), (width, count), shape, None, *total.relative(),
            stand_ins=stand_ins, places=places,
        )  # fmt: skip


def energies(weight: Tensor, stats: Stats, alpha: float) -> Tensor:
    """Energy of each input of a weight (m, n), float64 (n,): ``‖W[:, c]‖² ((1 - α) Σ_t x_tc² + α max_t x_tc²)``.

    Examples
    --------
    >>> stats = Stats.from_inputs(torch.tensor([[3.0, 2.0], [0.0, 2.0], [0.0, 2.0]]))
    >>> [energies(torch.ones(1, 2), stats, alpha).tolist() for alpha in (0.0, 1.0)]
    [[9.0, 12.0], [9.0, 4.0]]
    """
    assert stats.gram is not None
    squares, largest = stats.gram.diagonal().double(), stats.absmax.double().square()
    return weight.double().square().sum(0) * ((1 - alpha) * squares + alpha * largest)


def _sizes(block: Mixture, expert: int, labels: Mapping[str, Tensor]) -> Tensor:
    """What stands for energies where no token came by: the product of the squared norms of all that a feature goes through."""
    sizes = block.matrix(f"{expert}.down").double().square().sum(0)
    for name, numbers in labels.items():
        rows = block.matrix(block.role(expert, name)).double().square().sum(1)
        sizes = sizes.scatter_reduce(0, numbers.long(), rows, "prod")
    return sizes


class _Errors:
    """Squared errors and sizes of all experts together."""

    def __init__(self) -> None:
        self.weight, self.output, self.sample = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]

    def add(self, weight: Tensor, stand_in: ColumnSparse, stats: Stats | None) -> None:
        """Count an expert."""
        dense = stand_in.to_dense()
        self.weight[0] += squared_error(weight, dense, None)
        self.weight[1] += float(row_errors(weight, None).sum())
        if stats is None:
            return
        self.output[0] += squared_error(weight, dense, stats.gram)
        self.output[1] += float(row_errors(weight, stats.gram).sum())
        if stats.sample is not None and len(stats.sample):
            x = stats.sample.double()
            share = stats.tokens / len(x)
            self.sample[0] += share * float((x @ (weight.double() - dense.double()).T).square().sum())
            self.sample[1] += share * float((x @ weight.double().T).square().sum())

    def relative(self) -> tuple[float, float | None, float]:
        """Relative errors of the output, predicted and measured, and of the weight."""

        def ratio(error: float, size: float) -> float:
            return 0.0 if error == 0 else math.sqrt(error / size) if size > 0 else math.inf

        return ratio(*self.output), ratio(*self.sample) if self.sample[1] else None, ratio(*self.weight)
