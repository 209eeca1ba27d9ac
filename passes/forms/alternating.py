"""Fits that take turns: terms of a sum, factors of a product."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product, Sum
from recast.passes.forms.form import Form, data_error
from recast.passes.forms.gradient import refine
from recast.passes.forms.linear_algebra import behind, best_left, leading_subspace, pseudo_inverse
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats, all_finite, row_errors
from recast.patterns.errors import WeightError

__all__ = ["fit_product", "fit_sum", "wide_dtype"]

# A fit stops when a round lowers the squared error by less than this fraction, or after so many rounds.
# LQ-LoRA allows a hundred rounds; a few are kept here for speed, at the price of what later ones would bring.
_GAIN = 1e-2
_ROUNDS = 5


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a part of a weight is fitted before it takes the weight's own."""
    return torch.promote_types(dtype, torch.float32)


def _error(weight: Tensor, operator: Operator, stats: Stats | None) -> float:
    # Between factors of 16 bits nothing is rounded: what rounding adds has full rank, and a fit would take it for the weight's.
    return data_error(weight, operator.to(wide_dtype(weight.dtype)), stats)


def _best_round(weight: Tensor, stats: Stats | None, rounds: Iterator[Operator]) -> tuple[float, Operator]:
    """Run rounds until the error stops falling; return the least error and its operator, never worse than the first."""
    best = next(rounds)
    least = _error(weight, best, stats)
    # Below rounding there is nothing left to gain but noise.
    size = float(row_errors(weight, None if stats is None else stats.gram).sum())
    floor = size * (4 * torch.finfo(weight.dtype).eps) ** 2
    if least <= floor:
        return least, best
    for _, found in zip(range(_ROUNDS - 1), rounds, strict=False):
        error = _error(weight, found, stats)
        small = error > least * (1 - _GAIN) or error <= floor
        if error < least:
            best, least = found, error
        if small:
            break
    return least, best


def fit_sum(terms: Sequence[Form], weight: Tensor, stats: Stats | None) -> Operator:
    """Fit each term in turn to what the others leave; of two orders of turns the one that begins better goes on."""
    order = sorted(range(len(terms)), key=lambda i: str(terms[i]))
    begun = []
    for way in (order, order[::-1]):
        rounds = _sum_rounds(terms, weight, stats, way)
        first = next(rounds)
        begun.append((_error(weight, first, stats), first, rounds))
    _, first, rounds = min(begun, key=lambda start: start[0])
    return _best_round(weight, stats, itertools.chain((first,), rounds))[1]


def _sum_rounds(terms: Sequence[Form], weight: Tensor, stats: Stats | None, order: list[int]) -> Iterator[Operator]:
    wide = weight.to(wide_dtype(weight.dtype))
    parts: dict[int, Operator] = {}
    while True:
        for i in order:
            rest = wide
            for j, part in parts.items():
                if j != i:
                    rest = rest - part.to_dense().to(wide.dtype)
            # The whole sum is compared with its data-free fit in the end; its terms need not be, each time.
            parts[i] = terms[i].solve(rest, stats).to(weight.dtype)
        yield Sum(tuple(parts[i] for i in range(len(terms))))


def fit_product(
    factors: Sequence[Form], shapes: Sequence[tuple[int, int]], weight: Tensor, stats: Stats | None
) -> Operator:
    """Fit each factor in turn with the others held, from several starts, and return the best found.

    With everything to the right of the first factor held, min over L of ``‖(W - L R) X‖`` is a fit of L's form to
    ``W G Rᵀ (R G Rᵀ)⁺`` under the statistics behind R, exactly. For a factor with others to its left the target is also
    multiplied by their pseudo-inverse, a projection that need not help: the change is kept only if it does. In the end
    all factors together take some steps of Adam.
    """
    turns = _Turns(factors, shapes, weight, stats)
    starts = [_best_round(weight, stats, turns.rounds(start)) for start in turns.starts() if start is not None]
    if not starts:
        text = " @ ".join(map(str, factors))
        raise WeightError(
            f"{text}: factors of this weight {tuple(weight.shape)} leave the range of {weight.dtype}; weight.float() would work"
        )
    best = min(starts, key=lambda found: found[0])[1]
    # For the inner factors the turns are no more than a heuristic: the gradient of the error goes on from there.
    return refine(best, weight, stats)


Parts = tuple[Operator, ...]


class _Turns:
    def __init__(
        self, factors: Sequence[Form], shapes: Sequence[tuple[int, int]], weight: Tensor, stats: Stats | None
    ) -> None:
        self.factors, self.shapes, self.weight, self.stats = factors, shapes, weight, stats

    def starts(self) -> Iterator[Parts | None]:
        """Begin with one factor carrying the weight and identities around it, and with the halves of SVDs.

        None where numbers leave the range of the weight's dtype: what one factor all but drops, the next would make up for.
        """
        square = [m == n for m, n in self.shapes]
        for carrier in range(len(self.factors)):
            if all(is_square for i, is_square in enumerate(square) if i != carrier):
                around = [
                    None if i == carrier else self._fit(i, torch.eye(n), None) for i, (_, n) in enumerate(self.shapes)
                ]
                yield self._solved(around, carrier)
        if all(inner <= min(self.weight.shape) for inner, _ in self.shapes[1:]):
            yield self._split()

    def _split(self) -> Parts | None:
        parts: list[Operator] = []
        rest, stats = self.weight.double(), self.stats
        for i in range(len(self.factors) - 1, 0, -1):
            gram = None if stats is None else stats.gram
            half = leading_subspace(rest, gram, rank=self.shapes[i][0]).T @ rest
            parts.append(self._fit(i, half, stats))
            if not _holds(parts[-1]):
                return None
            right = parts[-1].to(wide_dtype(self.weight.dtype))
            seen, seen_gram = behind(right, stats)
            rest, stats = best_left(rest, right, stats, seen_gram), seen
        first = self._fit(0, rest, stats)
        return (first, *reversed(parts)) if _holds(first) else None

    def rounds(self, parts: Parts) -> Iterator[Operator]:
        least = _error(self.weight, _multiplied(parts), self.stats)
        while True:
            yield _multiplied(parts)
            for i in range(len(parts)):
                tried = self._solved(parts, i)
                # What is lost in a factor within, the first factor can make up for.
                for candidate in (tried,) if i == 0 or tried is None else (tried, self._solved(tried, 0)):
                    if candidate is None:
                        continue
                    error = _error(self.weight, _multiplied(candidate), self.stats)
                    if error < least:
                        parts, least = candidate, error

    def _solved(self, parts: Sequence[Operator | None], i: int) -> Parts | None:
        """Fit factor i to its target, all others held; None where that leaves the range of the weight's dtype."""
        before, after = _present(parts[:i]), _present(parts[i + 1 :])
        target, seen = self.weight.double(), self.stats
        wide = wide_dtype(self.weight.dtype)
        if after:
            right = _multiplied(after).to(wide)
            seen, gram = behind(right, self.stats)
            target = best_left(self.weight, right, self.stats, gram)
        if before:
            left = _multiplied(before).to(wide).to_dense().double()
            target = pseudo_inverse(left.T @ left) @ (left.T @ target)
        if not all_finite(target.to(wide_dtype(self.weight.dtype))):
            return None
        found = self._fit(i, target, seen)
        return (*before, found, *after) if _holds(found) else None

    def _fit(self, i: int, target: Tensor, stats: Stats | None) -> Operator:
        target = target.to(self.weight.device, wide_dtype(self.weight.dtype))
        return self.factors[i].fit(target, stats).to(self.weight.dtype)


def _holds(operator: Operator) -> bool:
    """Whether all of its numbers are finite."""
    return all(all_finite(tensor) for tensor in operator.tensors().values() if tensor.is_floating_point())


def _present(parts: Sequence[Operator | None]) -> Parts:
    return tuple(part for part in parts if part is not None)


def _multiplied(parts: Parts) -> Operator:
    """Nest factors to the right: a(b(c))."""
    return functools.reduce(lambda right, left: Product(left, right), reversed(parts))
