"""Feed-forward blocks of fewer hidden features: those kept that tell most about all, and the last linear solved anew."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.cache import Fitted
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.linear_algebra import CUTOFF, pseudo_inverse
from recast.passes.forms.operator import Dense
from recast.passes.forms.stats import squared_error
from recast.passes.modules.block import Block, labels_of_rows
from recast.passes.modules.flow import Refused
from recast.passes.modules.form import Fit, Made, ModuleForm
from recast.patterns.errors import FormError

__all__ = ["Nystrom", "leverage_scores", "on_features"]


@dataclass(frozen=True)
class Nystrom(ModuleForm):
    """``y = W_d z  ->  y = W_d' z_S``: hidden features S are kept with their rows of gate and up, and W_d' is least squares.

    S are the features with the largest ridge leverage scores ``[C (C + λI)⁻¹]_ii``, where C is the Gram matrix of the hidden
    values z and λ is `ridge` times their mean square. The output error that is predicted is that of ``W_d' z_S``.

    Hidden features of enormous size that tell each other, as networks have, share a score: two that are alike get a half each, and
    both are left out where all others get more, though neither can be told without the other. So two other rankings are tried, λ
    at the mean square itself and the energy ``‖W_d[:, i]‖² C_ii``, and the one whose output is nearest is taken.

    Notes
    -----
    Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression (2024), type I. The other rankings are ours.
    """

    name: ClassVar[str] = "nystrom"
    site_kind: ClassVar[str] = "mlp"
    summary: ClassVar[str] = "fewer hidden features in a feed-forward block"
    parts: ClassVar[str] = "a whole feed-forward block (gate, up and down)"

    ridge: float = field(default=1e-2, kw_only=True, metadata={"help": "λ, in mean squares of a hidden feature"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ridge < float("inf"):
            raise FormError(f"{self.name}: ridge is {self.ridge}, not a number from 0; 0.01 would work")

    def solve_block(self, block: Block) -> Fit:
        down = block.piece("down").site
        width = down.in_features
        labels = labels_of_rows(block, ("up", "gate"), width)
        order = block.arriving(labels, down.name)
        if not torch.equal(order.sort().values, torch.arange(width, dtype=torch.int32)):
            raise Refused(f"'{down.name}' does not take each hidden feature once")
        stats = block.stats("down", self)
        weight = block.matrix("down")
        count = self.width(width)
        seen = stats.regular.gram
        assert seen is not None
        kept = torch.arange(width)
        solved = weight
        if count < width:
            kept, solved = self._chosen(weight, seen, count)
        stand_in = _on(weight, kept, solved)
        fitted = Fitted.of(weight, stand_in, stats)
        made = {down.name: Made(stand_in.values.to_dense(), stats=stand_in.seen_by_values(stats))}
        stays = order[kept].sort().values
        for role in ("up", "gate"):
            if role in block.pieces:
                name = block.piece(role).site.name
                own = (labels[name] < 0) | torch.isin(labels[name], stays)
                bias = block.bias(role)
                made[name] = Made(block.matrix(role)[own], None if bias is None else bias[own], labels[name])
        return Fit(
            made,
            down.name,
            stays,
            (width, count),
            stand_in.shape,
            stand_in,
            fitted.predicted_error,
            fitted.measured_error,
            fitted.weight_error,
        )

    def _chosen(self, weight: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The features that stay, by the ranking with which the output is nearest, and the last matrix solved for them."""
        best, least = None, torch.inf
        energies = seen.diagonal().double() * weight.double().square().sum(0)
        for scores in (leverage_scores(seen, self.ridge), leverage_scores(seen, 1.0), energies):
            kept = scores.topk(count).indices.sort().values
            solved = on_features(weight, seen, kept)
            error = squared_error(weight, _on(weight, kept, solved).to_dense(), seen)
            if best is None or error < least:
                best, least = (kept, solved), error
        assert best is not None
        return best


def _on(weight: Tensor, kept: Tensor, solved: Tensor) -> ColumnSparse:
    """The last matrix as it is on what is kept."""
    return ColumnSparse(Dense(solved.to(weight.dtype)), kept.to(torch.int32), weight.shape[1])


def leverage_scores(gram: Tensor, ridge: float) -> Tensor:
    """Ridge leverage scores ``[C (C + λI)⁻¹]_ii`` of features with Gram matrix C (n, n), λ = `ridge` · mean of its diagonal.

    Examples
    --------
    >>> leverage_scores(torch.diag(torch.tensor([3.0, 1.0])), 0.5).round(decimals=6).tolist()
    [0.75, 0.5]
    """
    c = gram.double()
    # Without any ridge, features that others tell exactly still need a matrix that can be inverted.
    shift = max(ridge, 1e-10) * float(c.diagonal().mean())
    if shift == 0:
        return torch.zeros(c.shape[0], dtype=torch.float64, device=c.device)
    shifted = c.clone()
    shifted.diagonal().add_(shift)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    return 1 - shift * inverse.diagonal()


def on_features(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Return the W' (m, k) that minimises ``‖W X - W' X_S‖``, ``W C_:S C_SS⁻¹``, float64.

    Features that are zero throughout keep their columns.

    Parameters
    ----------
    weight
        (m, n).
    gram
        (n, n), C = X Xᵀ.
    kept
        Indices S (k,).
    """
    c, w = gram.double(), weight.double()
    inner, left_out = c[kept][:, kept], w.index_fill(1, kept, 0) @ c[:, kept]
    factor, failed = torch.linalg.cholesky_ex(inner)
    sizes = factor.diagonal().square()
    if int(failed) == 0 and float(sizes.min()) > CUTOFF * float(sizes.max()):
        return w[:, kept] + torch.cholesky_solve(left_out.T, factor).T
    return w[:, kept] + left_out @ pseudo_inverse(inner)
