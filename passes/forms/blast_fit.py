"""The fit of BLAST matrices: preconditioned gradient steps, factor by factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.passes.forms.linear_algebra import leading_subspace, pseudo_inverse, scaled_copy, solve_positive

__all__ = ["fit_blast"]

_DAMPING = 0.1  # δ of the paper
# Rounds without a gain of this fraction after which the fit ends early.
_PATIENCE, _GAIN = 20, 1e-3


def fit_blast(
    weight: Tensor, gram: Tensor | None, blocks: int, rank: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit W_ij ≈ B_i diag(d_ij) C_jᵀ on a grid of blocks x blocks.

    Each factor takes a step of its gradient times ``(H + δ √loss I)⁻¹``, H being the Gram matrix of what the other two
    make of it, with steps falling from 1 to 0 (Lee et al. 2024, algorithm 2). As the loss falls that becomes alternating
    least squares. With a Gram matrix of the data, the blocks of inputs are coupled: C_j and d_:j go one j after the other,
    preconditioned with G_jj too.

    Returns
    -------
    B (b, m/b, r), d (b, b, r), C (b, n/b, r), float64, the best of all rounds; the start is the low-rank fit.
    """
    m, n = weight.shape
    wide = torch.float64 if m * n <= 1 << 20 else torch.float32
    scale = float(weight.double().norm()) or 1.0
    target = (weight.double() / scale).to(wide)
    data = None
    if gram is not None and bool(gram.trace() > 0):
        data = scaled_copy(gram.to(weight.device), gram.trace() / n, wide)
    basis = leading_subspace(target, data, rank=rank).to(wide)
    right = basis.T @ target
    size = right.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, 1)
    state = _State(
        (basis * size).reshape(blocks, m // blocks, rank),
        torch.ones(blocks, blocks, rank, dtype=wide, device=weight.device),
        (right / size.unsqueeze(1)).T.reshape(blocks, n // blocks, rank).contiguous(),
    )
    best = _descend(state, target, data, iterations)
    share = math.sqrt(scale)
    return best.left.double() * share, best.weights.double(), best.right.double() * share


class _State:
    def __init__(self, left: Tensor, weights: Tensor, right: Tensor) -> None:
        self.left, self.weights, self.right = left, weights, right

    def clone(self) -> _State:
        return _State(self.left.clone(), self.weights.clone(), self.right.clone())

    def inner(self, i: int) -> Tensor:
        """What B_i multiplies, transposed: (n, r). Those of all i would be b times as large."""
        return (self.weights[i].unsqueeze(1) * self.right).flatten(0, 1)

    def grams(self, gram: Tensor | None) -> Tensor:
        """Gram matrices of what the B_i multiply, under the data: (b, r, r).

        By the products of the C_j with each other, which all rows of blocks have in common: r n (n + r) operations, where
        each row's own would take b times as many.
        """
        blocks, columns, rank = self.right.shape
        total = self.right.new_zeros(blocks, rank, rank)
        for j in range(blocks):  # half of the symmetric sum: blocks up to j, and half of the j-th with itself
            own, weights = slice(j * columns, (j + 1) * columns), self.weights[:, : j + 1].clone()
            weights[:, j] /= 2
            if gram is None:
                met, weights = (self.right[j].T @ self.right[j]).unsqueeze(0), weights[:, j:]
            else:
                seen = (self.right[j].T @ gram[own, : (j + 1) * columns]).reshape(rank, j + 1, columns)
                met = seen.transpose(0, 1) @ self.right[: j + 1]
            # Σ_k K_jk diag(d_ik), by columns of K_jk.
            among = met.permute(2, 1, 0) @ weights.permute(2, 1, 0)
            total += self.weights[:, j].unsqueeze(2) * among.permute(2, 1, 0)
        return total + total.mT

    def outer(self, j: int) -> Tensor:
        """What C_jᵀ is multiplied with: (m, r)."""
        return (self.left * self.weights[:, j].unsqueeze(1)).flatten(0, 1)

    def gap(self, target: Tensor) -> Tensor:
        """What is missing of the target, (m, n)."""
        found = target.clone()
        for i, rows in enumerate(found.chunk(len(self.left))):
            rows.addmm_(self.left[i], self.inner(i).T, alpha=-1)
        return found

    def pull(self, seen: Tensor) -> Tensor:
        """Products of each row of blocks of (m, n) with what its B_i multiplies: (b, r, m / b)."""
        return torch.stack([(rows @ self.inner(i)).T for i, rows in enumerate(seen.chunk(len(self.left)))])


def _descend(state: _State, target: Tensor, gram: Tensor | None, iterations: int) -> _State:
    blocks, columns, _ = state.right.shape
    inverses = None
    if gram is not None:
        cut = gram.reshape(blocks, columns, -1)
        inverses = [pseudo_inverse(cut[j, :, j * columns : (j + 1) * columns]).to(target.dtype) for j in range(blocks)]
    best, least, since = state.clone(), math.inf, 0
    for round_ in range(iterations + 1):
        gap = state.gap(target)
        seen = gap if gram is None else gap @ gram
        loss = float((gap * seen).sum())
        since = 0 if loss < least * (1 - _GAIN) else since + 1
        if loss < least:
            best, least = state.clone(), loss
        if not loss > 1e-24 or round_ == iterations or since > _PATIENCE:  # exact, or no longer finite
            break
        step, damping = 1 - round_ / iterations, _DAMPING * math.sqrt(loss)
        pull = state.pull(seen)
        del gap, seen
        state.left = state.left + step * _solved(state.grams(gram), pull, damping).mT
        gap = state.gap(target)
        for j in range(blocks):
            own = slice(j * columns, (j + 1) * columns)
            outer = state.outer(j)
            seen_j = gap[:, own] if gram is None else gap @ gram[:, own]
            pull = outer.T @ (seen_j if inverses is None else seen_j @ inverses[j])
            change = step * _solved(outer.T @ outer, pull, damping)
            state.right[j] += change.T
            made = outer @ change
            gap[:, own] -= made
            seen_j = gap[:, own] if gram is None else seen_j - made @ gram[own, own]
            # Each d_ij: the Gram matrices of B_i and C_j, multiplied value by value.
            right = state.right[j]
            within = right.T @ (right if gram is None else gram[own, own] @ right)
            pulls = (state.left * (seen_j @ right).reshape(state.left.shape)).sum(1)
            change = step * _solved(state.left.mT @ state.left * within, pulls.unsqueeze(-1), damping).squeeze(-1)
            gap[:, own] -= ((state.left * change.unsqueeze(1)) @ right.T).flatten(0, 1)
            state.weights[:, j] += change
    return best


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    floor = gram.diagonal(dim1=-1, dim2=-2).amax(-1) * 1e-10 + torch.finfo(gram.dtype).tiny ** 0.5
    ridge = damping + floor[..., None, None] if gram.dim() == 3 else damping + floor
    return solve_positive(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype), right)
