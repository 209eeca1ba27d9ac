"""Two block-diagonal matrices with a shuffle between them: the fit that Monarch, BlockShuffle and BlockDense share.

With inputs cut into K blocks of p features and outputs read as (l, j), j among J, the matrix is a grid of J K slices

    ``W[(l, j), (k, i)] ≈ Σ_t U[j, k, l, t] V[j, k, t, i]``,

each of rank T by itself. U makes the J blocks (m/J, K T) of the left matrix, V the K blocks (J T, n/K) of the right one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.linear_algebra import leading_subspace, pseudo_inverse
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.permutation import Shuffle
from recast.passes.forms.stats import Stats

__all__ = ["fit_slices", "outline_slices"]

# Rounds of least squares under statistics stop here, or when one lowers the squared error by less than this fraction.
_ROUNDS = 12
_GAIN = 1e-3


def fit_slices(weight: Tensor, stats: Stats | None, inputs: int, outputs: int, rank: int) -> Operator:
    """Fit a weight (m, n) by `outputs` blocks after `inputs` blocks, slices of the given rank.

    Without statistics the slices are independent and each is a truncated SVD: the projection of Dao et al. (Monarch:
    Expressive Structured Matrices for Efficient and Accurate Training, 2022), optimal. With a Gram matrix G that couples
    the blocks of inputs, the SVDs are those of slices whitened with the diagonal blocks of G; from there the left
    factor, and the blocks of the right one by one, are solved for exactly in turns, so the error never rises.
    """
    m, n = weight.shape
    slices = weight.double().reshape(m // outputs, outputs, inputs, n // inputs).permute(1, 2, 0, 3)
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device, torch.float64)
    left = _subspaces(slices, gram, rank)
    right = left.mT @ slices
    if gram is not None:
        left, right = _in_turns(weight.double(), gram, left, right)
    # Equal norms on both sides, which for the SVD is the split of the roots: no factor over- or underflows.
    size = (right.norm(dim=-1) / left.norm(dim=-2).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    size = torch.where((size > 0) & torch.isfinite(size), size, 1)
    return _assemble((left * size.unsqueeze(-2)).to(weight.dtype), (right / size.unsqueeze(-1)).to(weight.dtype))


def outline_slices(shape: tuple[int, int], dtype: torch.dtype, inputs: int, outputs: int, rank: int) -> Operator:
    """Return what `fit_slices` makes, on the meta device."""
    m, n = shape
    left = torch.empty(outputs, inputs, m // outputs, rank, dtype=dtype, device="meta")
    return _assemble(left, torch.empty(outputs, inputs, rank, n // inputs, dtype=dtype, device="meta"))


def _assemble(left: Tensor, right: Tensor) -> Operator:
    outputs, inputs, rows, rank = left.shape
    columns = right.shape[-1]
    before: Operator = BlockDiagonal(right.transpose(0, 1).reshape(inputs, outputs * rank, columns).contiguous())
    blocks = left.transpose(1, 2).reshape(outputs, rows, inputs * rank).contiguous()
    if outputs == 1:
        return Product(Dense(blocks[0]), before)
    # Features come out as (k, j, t) and are wanted as (j, k, t): a grid of K rows and J columns, t moving along.
    after = Product(BlockDiagonal(blocks), _moved(before, inputs, outputs, rank))
    return Product(Shuffle(outputs, rows, left.dtype), after)


def _moved(before: Operator, inputs: int, outputs: int, rank: int) -> Operator:
    if inputs == 1:
        return before
    return Product(Shuffle(inputs, outputs, before.dtype, rank), before)


def _subspaces(slices: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """Leading directions (J, K, l, T) of each slice (J, K, l, p), as the Gram matrix of its own inputs weighs them."""
    outputs, inputs, rows, columns = slices.shape
    if min(rows, columns) > 256:  # one eigenproblem on the smaller side each, rather than a batch of SVDs
        found = [
            leading_subspace(slices[j, k], _own(gram, k, columns), rank=rank)
            for j in range(outputs)
            for k in range(inputs)
        ]
        return torch.stack(found).reshape(outputs, inputs, rows, rank)
    weighted = slices
    if gram is not None:
        values, vectors = torch.linalg.eigh(_diagonal_blocks(gram, inputs))
        weighted = slices @ (vectors * values.clamp_min(0).sqrt().unsqueeze(-2))
    directions: Tensor = torch.linalg.svd(weighted, full_matrices=False).U[..., :rank]
    return directions


def _own(gram: Tensor | None, k: int, columns: int) -> Tensor | None:
    return None if gram is None else gram[k * columns : (k + 1) * columns, k * columns : (k + 1) * columns]


def _diagonal_blocks(gram: Tensor, count: int) -> Tensor:
    size = gram.shape[0] // count
    return torch.stack([gram[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(count)])


def _in_turns(weight: Tensor, gram: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for the left factor and for each block of the right one in turns, until a round gains too little.

    No product with G is taken twice: W G is there once, V G is carried along as V changes, and of what is missing D only
    D G is asked for, which is W G less U V G.
    """
    outputs, inputs, _, rank = left.shape
    columns = right.shape[-1]
    own = [slice(k * columns, (k + 1) * columns) for k in range(inputs)]
    # rows[j]: the outputs (l, j) of all l, (l, n).
    rows = weight.reshape(-1, outputs, weight.shape[1]).transpose(0, 1)
    inverses = [pseudo_inverse(gram[part, part]) for part in own]
    wanted = rows @ gram
    right = right.clone()
    seen = torch.stack([right[:, k] @ gram[part] for k, part in enumerate(own)], 1)  # V G, (J, K, T, n)
    missed = wanted - left.transpose(1, 2).flatten(2) @ seen.flatten(1, 2)  # D G, (J, l, n)
    best, least = (left, right.clone()), _error(rows, left, right, missed)
    for _ in range(_ROUNDS):
        # Left: block j reads the features Z_j x, so L_j = W_j G Z_jᵀ (Z_j G Z_jᵀ)⁺.
        met = torch.cat([wanted[..., part] @ right[:, k].mT for k, part in enumerate(own)], 2)
        within = torch.cat([seen.flatten(1, 2)[..., part] @ right[:, k].mT for k, part in enumerate(own)], 2)
        solved = torch.stack([a @ pseudo_inverse(b) for a, b in zip(met, within, strict=True)])
        left = solved.reshape(outputs, -1, inputs, rank).transpose(1, 2)
        torch.sub(wanted, solved @ seen.flatten(1, 2), out=missed)
        # Right: with block k alone free, V_jk changes by (UᵀU)⁺ Uᵀ (D G)_k (G_kk)⁺, D being what is missing.
        for k, part in enumerate(own):
            pull = left[:, k].mT @ missed[..., part]
            change = torch.stack([pseudo_inverse(u.T @ u) @ each for u, each in zip(left[:, k], pull, strict=True)])
            change = change @ inverses[k]
            right[:, k] += change
            moved = change @ gram[part]
            seen[:, k] += moved
            missed.baddbmm_(left[:, k], moved, alpha=-1)
        error = _error(rows, left, right, missed)
        enough = not error < least * (1 - _GAIN)
        if error < least:
            best, least = (left, right.clone()), error
        if enough:
            break
    return best


def _dense(left: Tensor, right: Tensor) -> Tensor:
    """Rows of the matrix by j: (J, l, n)."""
    return (left @ right).transpose(1, 2).flatten(2)


def _error(rows: Tensor, left: Tensor, right: Tensor, missed: Tensor) -> float:
    """Squared error under G, of which `missed` is the product with what is missing."""
    return float((rows - _dense(left, right)).mul_(missed).sum().clamp_min(0))
