"""Learning a sparse dictionary: orthogonal matching pursuit and K-SVD in turns."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.passes.forms.linear_algebra import gram_root, leading_subspace, pseudo_inverse

__all__ = ["fit_dictionary", "pursue"]

_POWER = 8  # power iterations for an atom, as published
_SEED = 42
# A pursuit takes so many steps at most; where more atoms are wanted, several join at each.
_STEPS = 32
# Rounds without a gain of this fraction after which the learning ends.
_PATIENCE, _GAIN = 5, 1e-3
# Outputs that are coded together, which bounds the memory of their systems of equations.
_TOGETHER = 1 << 24


def fit_dictionary(
    weight: Tensor, gram: Tensor | None, atoms: int, nonzeros: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit W ≈ S D with `nonzeros` values in each row of S.

    Rows of ``W R``, with ``G = R Rᵀ``, are coded by matching pursuit over the atoms, then each atom with the values that
    use it becomes the leading singular pair of what is left without it (K-SVD, Aharon, Elad and Bruckstein 2006). The
    pursuit is greedy, so a round may be worse than the one before: the best is kept. In the end D is the least-squares
    solution for S, which is the same whatever the data: no inverse of R is taken.

    Starts from the leading directions of ``W R``, then its rows by a fixed draw.

    Returns
    -------
    S (m, k), the mask of its chosen places, and D (k, n), float64.
    """
    wide = weight.double()
    signals = wide if gram is None else wide @ gram_root(gram.to(weight.device))
    if signals.shape[1] > len(signals):  # atoms lie in the span of the rows, which has no more dimensions than rows
        signals = torch.linalg.qr(signals.mT, mode="r")[1].mT.contiguous()
    dictionary = _start(signals, atoms)
    best, least, since = None, float("inf"), 0
    for _ in range(iterations):
        codes, mask = pursue(signals, dictionary, nonzeros)
        codes, dictionary, error = _learn(signals, codes, mask, dictionary)
        since = 0 if error < least * (1 - _GAIN) else since + 1
        if best is None or error < least:
            best, least = (codes, mask), error
        if since >= _PATIENCE or least == 0:
            break
    assert best is not None
    codes, mask = best
    dictionary = pseudo_inverse(codes.T @ codes) @ (codes.T @ wide)
    size = (codes.norm(dim=0) / torch.where(dictionary.norm(dim=1) > 0, dictionary.norm(dim=1), 1)).sqrt()
    size = torch.where(size > 0, size, 1)
    return codes / size, mask, dictionary * size.unsqueeze(1)


def _start(signals: Tensor, atoms: int) -> Tensor:
    directions = leading_subspace(signals.T, None, rank=min(atoms, *signals.shape)).T
    generator = torch.Generator(device=signals.device).manual_seed(_SEED)
    rows = torch.randperm(len(signals), generator=generator, device=signals.device)[: atoms - len(directions)]
    drawn = torch.randn(
        atoms - len(directions) - len(rows),
        signals.shape[1],
        dtype=signals.dtype,
        device=signals.device,
        generator=generator,
    )
    return _normal(torch.cat([directions, signals[rows], drawn]))


def _normal(rows: Tensor) -> Tensor:
    size = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(size > 0, size, 1)


def pursue(signals: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Code each signal by its best atoms: matching pursuit with all values solved for anew at each step.

    Parameters
    ----------
    signals
        (m, n).
    dictionary
        (k, n), atoms of length one.
    nonzeros
        Atoms that each signal gets; beyond 32, several are taken at a step.

    Returns
    -------
    Codes (m, k) and the mask of chosen places, `nonzeros` in each row.
    """
    inner = dictionary @ dictionary.T
    groups = max(1, _TOGETHER // max(1, nonzeros**2))
    found = [_pursue(part @ dictionary.T, inner, nonzeros) for part in signals.split(groups)]  # type: ignore[no-untyped-call]
    return torch.cat([codes for codes, _ in found]), torch.cat([mask for _, mask in found])


def _pursue(met: Tensor, inner: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Code by the products of signals with atoms (m, k) and of atoms with each other (k, k).

    The inverse of the Cholesky factor of each signal's system grows by the rows of the atoms that join, and the values change by
    what those rows add (Rubinstein, Zibulevsky and Elad 2008 keep the factor and solve with it): all steps together cost what
    the last system alone would, in products of matrices and no solution of a large system.
    """
    m = len(met)
    codes = torch.zeros_like(met)
    mask = torch.zeros_like(met, dtype=torch.bool)
    chosen = torch.empty(m, nonzeros, dtype=torch.int64, device=met.device)
    at_once = -(-nonzeros // _STEPS)
    inverse = met.new_zeros(m, nonzeros, nonzeros)
    forward = met.new_zeros(m, nonzeros, 1)
    values = met.new_zeros(m, nonzeros)
    for done in range(0, nonzeros, at_once):
        end = min(done + at_once, nonzeros)
        left = torch.addmm(met, codes, inner, alpha=-1).abs_().masked_fill_(mask, -1)
        more = left.topk(end - done, dim=1).indices
        mask.scatter_(1, more, True)
        chosen[:, done:end] = more
        known = inverse[:, :done, :done]
        across = known @ inner[chosen[:, :done].unsqueeze(2), more.unsqueeze(1)]
        own = _lower(inner[more.unsqueeze(2), more.unsqueeze(1)] - across.mT @ across)
        joined = torch.eye(end - done, dtype=met.dtype, device=met.device).expand_as(own)
        joined = torch.linalg.solve_triangular(own, torch.cat([-across.mT @ known, joined], 2), upper=False)
        inverse[:, done:end, :end] = joined
        rest = met.gather(1, more).unsqueeze(2) - across.mT @ forward[:, :done]
        forward[:, done:end] = torch.linalg.solve_triangular(own, rest, upper=False)
        values[:, :end] += (joined.mT @ forward[:, done:end]).squeeze(2)
        codes.scatter_(1, chosen[:, :end], values[:, :end])
    return codes, mask


def _lower(systems: Tensor) -> Tensor:
    """Cholesky factors of what joins, of atoms of length one: a ridge stands for what atoms that are alike leave of it."""
    eye = torch.eye(systems.shape[-1], dtype=systems.dtype, device=systems.device)
    factors, failed = torch.linalg.cholesky_ex(systems + 1e-12 * eye)
    for ridge in (1e-9, 1e-6, 1e-3, 1.0):
        bad = failed > 0
        if not bool(bad.any()):
            break
        factors[bad], failed[bad] = torch.linalg.cholesky_ex(systems[bad] + ridge * eye)
    # Below zero by more than rounding: the factor so far is of no use for these, and what joins counts for itself.
    return torch.where((failed > 0)[:, None, None], eye, factors)


def _learn(signals: Tensor, codes: Tensor, mask: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor, float]:
    """One sweep over the atoms; returns the codes and atoms, and the squared error of both."""
    codes, dictionary = codes.clone(), dictionary.clone()
    rest = signals - codes @ dictionary
    for j in range(len(dictionary)):
        users = mask[:, j].nonzero().squeeze(1)
        if not len(users):  # an atom that nobody takes is given to the output that is served worst
            dictionary[j] = _normal(rest[rest.square().sum(1).argmax()].unsqueeze(0))[0]
            continue
        own = rest[users] + codes[users, j : j + 1] * dictionary[j]
        atom = dictionary[j]
        for _ in range(_POWER):
            atom = _normal(((own @ atom) @ own).unsqueeze(0))[0]
        if not bool(atom.any()):
            continue
        dictionary[j], codes[users, j] = atom, own @ atom
        rest[users] = own - codes[users, j : j + 1] * atom
    return codes, dictionary, float(rest.square().sum())
