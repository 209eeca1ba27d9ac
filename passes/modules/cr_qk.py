"""Attention heads with fewer features of queries and keys: those kept that scores are made of most."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.stats import Stats
from recast.passes.modules.block import Block
from recast.passes.modules.flow import Picks, Refused, stays
from recast.passes.modules.form import Fit, Made, ModuleForm
from recast.passes.modules.meeting import agree
from recast.patterns.sites import AttentionSite

__all__ = ["CrQK", "pair_scores"]


@dataclass(frozen=True)
class CrQK(ModuleForm):
    """``q · k`` of each head over fewer features: those with the largest ``|q_i| |k_i|`` on the data, without rescaling.

    Features that a rotary embedding turns into each other stay or go together, and count by the norm of the pair, which the
    turning keeps; the angles are chosen from in each head. Query heads that share keys share what is kept: their scores add up.
    The error that is predicted is that of the scores of all tokens with all others, before masks and angles.

    Notes
    -----
    Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression (2024), type II.
    """

    name: ClassVar[str] = "cr_qk"
    site_kind: ClassVar[str] = "attention:qk"
    summary: ClassVar[str] = "fewer features of queries and keys in each head of attention"
    parts: ClassVar[str] = "queries and keys of an attention block"

    def solve_block(self, block: Block) -> Fit:
        site = block.sites[0]
        assert isinstance(site, AttentionSite)
        sizes = {role: len(block.rows(role)) for role in ("q", "k")}
        depth = site.head_dim
        if any(size % depth for size in sizes.values()) or sizes["q"] % sizes["k"]:
            raise Refused(f"{sizes['q']} and {sizes['k']} features are no heads of {depth}")
        shared, groups = sizes["q"] // sizes["k"], _groups(block, site)
        labels = _labels(block, depth, shared, groups)
        agree(block, block.way(labels, None, Picks())[1])
        moments = {role: _moments(block, role, depth, block.stats(role, self)) for role in ("q", "k")}
        scores = pair_scores(moments["q"], moments["k"], groups)
        count = int(groups.max()) + 1
        members = torch.bincount(groups, minlength=count)
        kept: list[Tensor] = []
        left = 0
        for size in sorted(set(members.tolist())):  # pairs, and features that pass unturned
            own = (members == size).nonzero().flatten()
            keep = max(1, self.width(size * len(own)) // size)
            left += size * keep
            best = scores[:, own].topk(keep, 1).indices
            kept += [head * count + own[places].sort().values for head, places in enumerate(best)]
        numbers = torch.cat(kept).to(torch.int32)
        made: dict[str, Made] = {}
        lost = whole = 0.0
        for role in ("q", "k"):
            name = block.piece(role).site.name
            matrix, bias, own = block.matrix(role), block.bias(role), stays(labels[name], numbers)
            lost += float(matrix[~own].double().square().sum())
            whole += float(matrix[block.rows(role)].double().square().sum())
            made[name] = Made(matrix[own], None if bias is None else bias[own], labels[name])
        gone = ~stays(labels[block.piece("k").site.name][block.rows("k")], numbers).view(-1, depth)
        return Fit(
            made,
            None,
            numbers,
            (depth, left),
            (sizes["q"], block.piece("q").site.in_features),
            None,
            _error(moments["q"], moments["k"], gone),
            None,
            math.sqrt(lost / whole) if whole else 0.0,
        )


def _groups(block: Block, site: AttentionSite) -> Tensor:
    """For each feature of a head the number of the group that it stays or goes with, (depth,)."""
    groups = torch.arange(site.head_dim)
    turns = {rotary.name: rotary for rotary in block.rotary() if rotary.name in site.rotary}
    if len(turns) != len(site.rotary):
        raise Refused("how its queries and keys are turned cannot be told from the graph")
    for turn in turns.values():
        half, first = turn.rotated // 2, turn.start
        if turn.layout == "half":
            groups[first + half : first + 2 * half] = groups[first : first + half]
        else:
            groups[first + 1 : first + 2 * half : 2] = groups[first : first + 2 * half : 2]
    numbers = {group: number for number, group in enumerate(sorted(set(groups.tolist())))}
    return torch.tensor([numbers[group] for group in groups.tolist()])


def _labels(block: Block, depth: int, shared: int, groups: Tensor) -> dict[str, Tensor]:
    """Labels of the rows of queries and keys: head of keys and group, by the name of the linear."""
    found: dict[str, Tensor] = {}
    for role, heads in (("q", shared), ("k", 1)):
        piece, rows = block.piece(role), block.rows(role)
        labels = found.setdefault(piece.site.name, torch.full((piece.site.out_features,), -1, dtype=torch.int32))
        places = torch.arange(len(rows))
        own = places // depth // heads * (int(groups.max()) + 1) + groups[places % depth]
        labels[rows] = own.to(torch.int32)
    return found


def _moments(block: Block, role: str, depth: int, stats: Stats) -> Tensor:
    """Sums of products of features within each head over the data, (heads, depth, depth)."""
    rows, bias = block.rows(role), block.bias(role)
    heads = block.matrix(role)[rows].double().view(-1, depth, block.piece(role).site.in_features)
    gram = stats.regular.gram
    assert gram is not None
    found = heads @ gram @ heads.transpose(1, 2)
    if bias is None:
        return found
    shift = bias[rows].double().view(-1, depth, 1)
    crossed = stats.tokens * (heads @ stats.mean.double()).unsqueeze(2) @ shift.transpose(1, 2)
    return found + crossed + crossed.transpose(1, 2) + stats.tokens * shift @ shift.transpose(1, 2)


def pair_scores(queries: Tensor, keys: Tensor, groups: Tensor) -> Tensor:
    """What each group of features weighs in the scores of each head of keys, (heads of keys, groups).

    Parameters
    ----------
    queries, keys
        (heads, depth, depth), sums of products of features over the data.
    groups
        (depth,), the group of each feature.

    Examples
    --------
    >>> one = torch.diag(torch.tensor([4.0, 1.0, 0.0, 1.0])).unsqueeze(0)
    >>> pair_scores(one, one, torch.tensor([0, 1, 0, 1])).tolist()
    [[4.0, 2.0]]
    """
    count = int(groups.max()) + 1

    def energies(moments: Tensor) -> Tensor:
        diagonal = moments.diagonal(dim1=1, dim2=2).clamp_min(0)
        return diagonal.new_zeros(len(diagonal), count).index_add(1, groups, diagonal)

    q, k = energies(queries), energies(keys)
    shared = len(q) // len(k)
    return (q * k.repeat_interleave(shared, 0)).sqrt().view(len(k), shared, count).sum(1)


def _error(queries: Tensor, keys: Tensor, gone: Tensor) -> float:
    """Relative error of the scores of all queries with all keys of the data: ``‖Q_R K_Rᵀ‖ / ‖Q Kᵀ‖``, R the features left out."""
    shared = len(queries) // len(keys)
    k, out = keys.repeat_interleave(shared, 0), gone.repeat_interleave(shared, 0).to(keys.dtype)
    whole = float((queries * k).sum())
    lost = float((queries * k * out.unsqueeze(1) * out.unsqueeze(2)).sum())
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
