"""Two block-diagonal matrices with a shuffle between them: the fit that Monarch, BlockShuffle and BlockDense share.

With inputs cut into K blocks of p features and outputs read as (l, j), j among J, the matrix is a grid of J K slices

    ``W[(l, j), (k, i)] ≈ Σ_t U[j, k, l, t] V[j, k, t, i]``,

each of rank T by itself. U makes the J blocks (m/J, K T) of the left matrix, V the K blocks (J T, n/K) of the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.linear_algebra import leading_subspace, pseudo_inverse, times
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.permutation import Shuffle
from recast.passes.forms.stats import Stats

__all__ = ["fit_slices", "outline_slices"]

# Rounds of least squares under statistics stop here, or when one lowers the squared error by less than this fraction.
_ROUNDS = 12
_GAIN = 1e-3
# Rows whose errors are looked at together.
_SLAB = 512


def fit_slices(weight: Tensor, stats: Stats | None, inputs: int, outputs: int, rank: int) -> Operator:
    """Fit a weight (m, n) by `outputs` blocks after `inputs` blocks, slices of the given rank.

    Without statistics the slices are independent and each is a truncated SVD: the projection of Dao et al. (Monarch:
    Expressive Structured Matrices for Efficient and Accurate Training, 2022), optimal. With a Gram matrix G that couples
    the blocks of inputs, the SVDs are those of slices whitened with the diagonal blocks of G; from there the left
    factor, and the blocks of the right one by one, are solved for exactly in turns, so the error never rises.
    """
    m, n = weight.shape
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device, torch.float64)
    # rows[j]: the outputs (l, j) of all l, (l, n). Blocks of outputs do not meet: each has its own slices on both sides.
    inverses = [] if gram is None else [pseudo_inverse(_own(gram, k, n // inputs)) for k in range(inputs)]
    made = [
        _fit_rows(rows, gram, inverses, inputs, rank) for rows in weight.reshape(m // outputs, outputs, n).unbind(1)
    ]
    left, right = (torch.stack(sides) for sides in zip(*made, strict=True))
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


def _fit_rows(
    rows: Tensor, gram: Tensor | None, inverses: Sequence[Tensor], inputs: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Fit the outputs of one block (l, n): U (K, l, T) and V (K, T, p), float64."""
    slices = rows.double().unflatten(1, (inputs, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]
    left = _subspaces(slices, gram, rank)
    right = left.mT @ slices
    del slices
    return (left, right) if gram is None else _in_turns(rows, gram, inverses, left, right)


def _subspaces(slices: Tensor, gram: Tensor | None, rank: int) -> Tensor:
    """Leading directions (K, l, T) of each slice (K, l, p), as the Gram matrix of its own inputs weighs them."""
    inputs, rows, columns = slices.shape
    if min(rows, columns) > 256:  # one eigenproblem on the smaller side each, rather than a batch of SVDs
        return torch.stack(
            [
                leading_subspace(each, None if gram is None else _own(gram, k, columns), rank=rank)
                for k, each in enumerate(slices.unbind())
            ]
        )
    weighted = slices
    if gram is not None:
        values, vectors = torch.linalg.eigh(_diagonal_blocks(gram, inputs))
        weighted = slices @ (vectors * values.clamp_min(0).sqrt().unsqueeze(-2))
    directions: Tensor = torch.linalg.svd(weighted, full_matrices=False).U[..., :rank]
    return directions


def _own(gram: Tensor, k: int, columns: int) -> Tensor:
    return gram[k * columns : (k + 1) * columns, k * columns : (k + 1) * columns]


def _diagonal_blocks(gram: Tensor, count: int) -> Tensor:
    size = gram.shape[0] // count
    return torch.stack([_own(gram, k, size) for k in range(count)])


def _in_turns(
    rows: Tensor, gram: Tensor, inverses: Sequence[Tensor], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares for U and for each block of V in turns, until a round gains too little.

    No product with G is taken twice: W G is there once and V G is carried along as V changes. Of what is missing D there are
    never more than a few rows.
    """
    inputs, count, rank = left.shape
    columns = right.shape[-1]
    own = [slice(k * columns, (k + 1) * columns) for k in range(inputs)]
    wanted = times(rows, gram)
    right = right.clone()
    seen = torch.cat([right[k] @ gram[part] for k, part in enumerate(own)])  # V G, (K T, n)
    best, least = (left, right.clone()), _error(rows, wanted, left, right, seen)
    for _ in range(_ROUNDS):
        # The block reads the features Z x, so L = W G Zᵀ (Z G Zᵀ)⁺.
        met = torch.cat([wanted[:, part] @ right[k].T for k, part in enumerate(own)], 1)
        within = torch.cat([seen[:, part] @ right[k].T for k, part in enumerate(own)], 1)
        solved = met @ pseudo_inverse(within)
        left = solved.reshape(count, inputs, rank).transpose(0, 1)
        # With block k of V alone free, it changes by (UᵀU)⁺ Uᵀ (D G)_k (G_kk)⁺, and D G is W G less U V G.
        among = solved.T @ solved
        for k, part in enumerate(own):
            ranks = slice(k * rank, (k + 1) * rank)
            pull = torch.addmm(left[k].T @ wanted[:, part], among[ranks], seen[:, part], alpha=-1)
            change = pseudo_inverse(among[ranks, ranks]) @ pull @ inverses[k]
            right[k] += change
            seen[ranks].addmm_(change, gram[part])
        error = _error(rows, wanted, left, right, seen)
        enough = not error < least * (1 - _GAIN)
        if error < least:
            best, least = (left, right.clone()), error
        if enough:
            break
    return best


def _error(rows: Tensor, wanted: Tensor, left: Tensor, right: Tensor, seen: Tensor) -> float:
    """Squared error under G: the sum of what is missing times its product with G, a few rows at a time."""
    total = wanted.new_zeros(())
    whole = left.transpose(0, 1).flatten(1)
    for start in range(0, len(rows), _SLAB):
        some = slice(start, start + _SLAB)
        missed = torch.addmm(wanted[some], whole[some], seen, alpha=-1)
        for u, v, own, pull in zip(
            left, right, rows[some].chunk(len(left), 1), missed.chunk(len(left), 1), strict=True
        ):
            total += torch.addmm(own.double(), u[some], v, alpha=-1).mul_(pull).sum()
    return float(total.clamp_min(0))
