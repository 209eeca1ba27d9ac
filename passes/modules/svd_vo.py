"""Attention heads with fewer value features: the product of values' and output's matrices of a head, of lower rank."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.cache import Fitted
from recast.passes.forms.algebra import Product
from recast.passes.forms.linear_algebra import CUTOFF, pseudo_inverse
from recast.passes.forms.operator import Dense
from recast.passes.modules.block import Block
from recast.passes.modules.flow import Refused, check_linear
from recast.passes.modules.form import Fit, Made, ModuleForm

__all__ = ["Head", "SvdVO", "heads_of", "narrowed"]


@dataclass(frozen=True)
class Head:
    """One head of values.

    Attributes
    ----------
    rows
        Rows of the values' matrix that make its d features, (d,).
    columns
        Columns of the output's matrix that take them: one row (d,) for each query head that shares the values, (r, d).
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class SvdVO(ModuleForm):
    """``W_O (W_V x)`` of each head becomes ``W_O' (W_V' x)`` through fewer features: the best product of that rank on the data.

    With S the Gram matrix of the values v of a head, and its output matrices W_O of all query heads that share v, the features
    kept are the leading eigenvectors E of ``S½ (Σ W_Oᵀ W_O) S½``: ``W_V' = Eᵀ S⁻½ W_V`` and ``W_O' = W_O S½ E``. That minimises
    ``‖W_O v - W_O' v'‖`` over the values of the data. `refit` solves for the output's matrix once more, by least squares on what
    attention makes of the values, all heads together.

    Notes
    -----
    Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression (2024), type III.
    """

    name: ClassVar[str] = "svd_vo"
    site_kind: ClassVar[str] = "attention"
    summary: ClassVar[str] = "fewer features of values in each head of attention"
    parts: ClassVar[str] = "a whole attention block (v and o)"

    refit: bool = field(
        default=False, kw_only=True, metadata={"help": "solve for the output's matrix on the data of all heads"}
    )

    def solve_block(self, block: Block) -> Fit:
        v, o = block.piece("v").site, block.piece("o").site
        rows = block.rows("v")
        labels = torch.full((v.out_features,), -1, dtype=torch.int32)
        labels[rows] = rows.to(torch.int32)
        order = block.arriving({v.name: labels}, o.name)
        heads = heads_of(block, {v.name: labels}, order, rows)
        seen, stats = block.stats("v", self), block.stats("o", self)
        matrix, bias, weight = block.matrix("v"), block.bias("v"), block.matrix("o")
        gram = seen.regular.gram
        assert gram is not None
        wide = heads[0].rows.numel()
        count = self.width(wide)
        # Copies: in float64 these would be the model's own weights.
        values, shift, outer = (
            None if held is None else held.to(torch.float64, copy=True) for held in (matrix, bias, weight)
        )
        assert values is not None
        assert outer is not None
        mix = torch.zeros(o.in_features, o.in_features, dtype=torch.float64, device=gram.device)  # old to new features
        for head in heads:
            own, b = values[head.rows], None if shift is None else shift[head.rows]
            if count < wide:
                moments = own @ gram @ own.T
                if b is not None:
                    crossed = torch.outer(own @ seen.mean.double(), b)
                    moments = moments + seen.tokens * (crossed + crossed.T + torch.outer(b, b))
                down, up = narrowed(moments, [weight[:, columns].double() for columns in head.columns], count)
            else:
                down = up = torch.eye(wide, dtype=torch.float64, device=gram.device)
            first = head.rows[:count]
            values[first] = down @ own
            if shift is not None and b is not None:
                shift[first] = down @ b
            for columns in head.columns:
                mix[columns[:count].unsqueeze(1), columns] = down
                outer[:, columns[:count]] = weight[:, columns].double() @ up
        kept = torch.cat([head.rows[:count] for head in heads]).to(torch.int32)
        stays = torch.isin(order, kept)
        mix, outer = mix[stays], outer[:, stays]
        if self.refit and count < wide and (flow := stats.regular.gram) is not None:
            outer = weight.double() @ flow @ mix.T @ pseudo_inverse(mix @ flow @ mix.T)
        mixing = Dense(mix.to(weight.dtype))
        stand_in = Product(Dense(outer.to(weight.dtype)), mixing)
        fitted = Fitted.of(weight, stand_in, stats)
        remains = (labels < 0) | torch.isin(labels, kept)
        new_bias = None if shift is None else shift[remains]
        return Fit(
            {v.name: Made(values[remains], new_bias, labels), o.name: Made(outer, stats=stats.through(mixing))},
            o.name,
            kept,
            (wide, count),
            stand_in.shape,
            stand_in,
            fitted.predicted_error,
            fitted.measured_error,
            fitted.weight_error,
        )


def heads_of(block: Block, labels: dict[str, Tensor], order: Tensor, rows: Tensor) -> list[Head]:
    """Heads of values, told by what enters the core of attention and what arrives at the output.

    Raises
    ------
    Refused
        Rows of the values' matrix are in no head or several, or the output takes some features more often than others.
    """
    sources, way = block.way(labels, block.piece("o").site.name)
    check_linear(way, sources)
    found: list[Tensor] = []
    for site in block.sites:
        value = getattr(site, "value", None)
        if value not in way or way[value].ndim < 3:
            raise Refused("its values cannot be told from the graph")
        found.append(way[value][..., 0, :].reshape(-1, way[value].shape[-1]).unique(dim=0).long())
    if any(not torch.equal(found[0], other) for other in found) or not torch.equal(
        found[0].flatten().sort().values, rows.sort().values
    ):
        raise Refused("its heads share rows of the values' matrix, or leave some out")
    columns: dict[int, list[int]] = {}
    for place, row in enumerate(order.tolist()):
        columns.setdefault(row, []).append(place)
    if len({len(places) for places in columns.values()}) != 1 or len(columns) != len(rows):
        raise Refused("the output takes some features of the values more often than others")
    heads = []
    for head in found[0]:
        taken = torch.tensor([columns[row] for row in head.tolist()])  # (d, query heads)
        heads.append(Head(head, taken.T.contiguous()))
    return heads


def narrowed(moments: Tensor, outputs: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return ``P`` (count, d) and ``Q`` (d, count) so that ``W Q P v`` is nearest to ``W v`` for all outputs W together.

    Parameters
    ----------
    moments
        (d, d), the sum of ``v vᵀ`` over the data.
    outputs
        Matrices (m, d) that are multiplied with v.
    count
        Features to keep.

    Examples
    --------
    >>> down, up = narrowed(torch.diag(torch.tensor([4.0, 1.0, 9.0])), [torch.eye(3)], 2)
    >>> (up @ down).round(decimals=6).abs().tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    squares, directions = torch.linalg.eigh(moments.double())
    shown = squares > CUTOFF * squares[-1].clamp_min(torch.finfo(torch.float64).tiny)
    sizes = torch.where(shown, squares, 0).sqrt()
    inverse = torch.where(shown, 1 / torch.where(shown, sizes, 1), 0)
    reach = torch.cat([w.double() for w in outputs]) @ (directions * sizes)
    # The right singular vectors, largest first, by an SVD of what QR leaves: as exact as one of all rows.
    right = torch.linalg.svd(torch.linalg.qr(reach, mode="r").R).Vh[:count]
    # New features get the mean square of the old ones, so that neither side over- or underflows in a narrow dtype.
    scale = sizes.square().mean().sqrt().clamp_min(1e-300)
    return (right * inverse) @ directions.T * scale, directions @ (right * sizes).T / scale
