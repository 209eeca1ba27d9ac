"""Sums, products and pipes of forms, and how any of them is fitted."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product, Sum
from recast.passes.forms.form import Form, data_error
from recast.passes.forms.linear_algebra import best_left, best_right, leading_subspace, seen_by_left
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["PipeForm", "ProductForm", "SumForm"]

# An alternating fit stops when a round lowers the squared error by less than this fraction, or after so many rounds.
_GAIN = 1e-3
_ROUNDS = 20


def _wrapped(form: Form, binding: int) -> str:
    return f"({form})" if form.binding < binding else str(form)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a part of a weight is fitted before it takes the weight's own."""
    return torch.promote_types(dtype, torch.float32)


def _best_round(weight: Tensor, stats: Stats | None, rounds: Iterator[Operator]) -> tuple[float, Operator]:
    """Run an alternating fit until its error stops falling; return the best there was."""
    best = next(rounds)
    least = data_error(weight, best, stats)
    for _, found in zip(range(_ROUNDS - 1), rounds, strict=False):
        error = data_error(weight, found, stats)
        small = error > least * (1 - _GAIN)
        if error < least:
            best, least = found, error
        if small:
            break
    return least, best


@dataclass(frozen=True)
class SumForm(Form):
    """Terms that are added; each is refitted in turn to what the others leave (for two: LQ-LoRA, Guo et al. 2023).

    Every order of taking turns is a start of its own (first to last and back, in the order of the terms' text), so the
    order in which the terms are written does not matter.
    """

    binding: ClassVar[int] = 2
    terms: tuple[Form, ...]

    @classmethod
    def of(cls, *terms: Form) -> SumForm:
        """Add forms; sums among them are opened, so that ``a + (b + c)`` is ``a + b + c``."""
        return cls(tuple(part for term in terms for part in (term.terms if isinstance(term, SumForm) else (term,))))

    def __post_init__(self) -> None:
        if len(self.terms) < 2 or any(isinstance(term, SumForm) for term in self.terms):
            raise FormError("sum: two or more terms that are not sums are needed; SumForm.of(...) would work")

    def __str__(self) -> str:
        return " + ".join(_wrapped(term, 3) for term in self.terms)

    @property
    def dense_leaves(self) -> bool:
        return any(term.dense_leaves for term in self.terms)

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        for term in self.terms:
            term.check(shape, where)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        parts = [term.outline(shape, dtype) for term in self.terms]
        known = tuple(part for part in parts if part is not None)
        return Sum(known) if len(known) == len(parts) else None

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        order = sorted(range(len(self.terms)), key=lambda i: str(self.terms[i]))
        starts = (_best_round(weight, stats, self._rounds(weight, stats, way)) for way in (order, order[::-1]))
        return min(starts, key=lambda found: found[0])[1]

    def _rounds(self, weight: Tensor, stats: Stats | None, order: list[int]) -> Iterator[Operator]:
        wide = weight.to(_wide(weight.dtype))
        parts: dict[int, Operator] = {}
        while True:
            for i in order:
                others = [part.to_dense().to(wide.dtype) for j, part in parts.items() if j != i]
                rest = wide - sum(others[1:], others[0]) if others else wide
                parts[i] = self.terms[i].fit(rest, stats).to(weight.dtype)
            yield Sum(tuple(parts[i] for i in range(len(self.terms))))


@dataclass(frozen=True)
class ProductForm(Form):
    """Factors that are multiplied, y = f1(f2(... x)).

    Inner sizes: factors that only mix features (block-diagonal ones) are square and stand around those that carry the
    weight; between two carrying factors the size is min(m, n). ``block_diagonal(4) @ int8 @ block_diagonal(4)`` of an
    (m, n) weight has an (m, m), an (m, n) and an (n, n) factor. With mixing factors alone, the inner size is min(m, n).
    """

    binding: ClassVar[int] = 3
    factors: tuple[Form, ...]

    @classmethod
    def of(cls, *factors: Form) -> ProductForm:
        """Multiply forms; products among them are opened."""
        return cls(tuple(p for f in factors for p in (f.factors if isinstance(f, ProductForm) else (f,))))

    def __post_init__(self) -> None:
        if len(self.factors) < 2 or any(isinstance(factor, ProductForm) for factor in self.factors):
            raise FormError(
                "product: two or more factors that are not products are needed; ProductForm.of(...) would work"
            )

    def __str__(self) -> str:
        return " @ ".join(_wrapped(factor, 4) for factor in self.factors)

    @property
    def dense_leaves(self) -> bool:
        return any(factor.dense_leaves for factor in self.factors)

    @property
    def wrapper(self) -> bool:
        return all(factor.wrapper for factor in self.factors)

    def shapes(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the shape of each factor for a weight (m, n)."""
        m, n = shape
        carriers = [i for i, factor in enumerate(self.factors) if not factor.wrapper]
        if not carriers:
            # The one factor that is not square stands where the others come out smaller.
            carriers = [len(self.factors) - 1] if m <= n else [0]
        sizes = [m] + [
            m if i < carriers[0] else n if i >= carriers[-1] else min(m, n) for i in range(len(self.factors))
        ]
        return list(itertools.pairwise(sizes))

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        for factor, own in zip(self.factors, self.shapes(shape), strict=True):
            factor.check(own, where)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        made: Operator | None = None
        for factor, own in reversed(list(zip(self.factors, self.shapes(shape), strict=True))):
            part = factor.outline(own, dtype)
            if part is None:
                return None
            made = part if made is None else Product(part, made)
        return made

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        left = self.factors[0]
        right = self.factors[1] if len(self.factors) == 2 else ProductForm(self.factors[1:])
        inner = self.shapes((weight.shape[0], weight.shape[1]))[0][1]
        fitting = _TwoFactors(left, right, weight, stats)
        starts = (_best_round(weight, stats, fitting.rounds(start)) for start in fitting.starts(inner))
        return min(starts, key=lambda found: found[0])[1]


class _TwoFactors:
    """Alternating fit of ``left @ right`` to one weight."""

    def __init__(self, left: Form, right: Form, weight: Tensor, stats: Stats | None) -> None:
        self.left, self.right, self.weight, self.stats = left, right, weight, stats
        self.wide = _wide(weight.dtype)

    def starts(self, inner: int) -> list[Callable[[], Product]]:
        """List ways to begin: the halves of an SVD, and either factor the identity where its shape allows."""
        m, n = self.weight.shape
        found: list[Callable[[], Product]] = []
        if inner <= min(m, n):
            found.append(lambda: self._from_right(self._halves(inner)))
        eye = torch.eye(inner, dtype=self.wide, device=self.weight.device)
        if inner == n:
            found.append(lambda: self._from_right(eye))
        if inner == m:
            found.append(lambda: self._with_left(self._fit(self.left, eye, None)))
        return found

    def rounds(self, start: Callable[[], Product]) -> Iterator[Operator]:
        best = start()
        least = data_error(self.weight, best, self.stats)
        while True:
            yield best
            # With R fixed, the best L is a fit of the leaf to the unconstrained optimum, under the statistics behind R.
            for step in (self._improve_left, self._improve_right):
                found = step(best)
                error = data_error(self.weight, found, self.stats)
                if error < least:
                    best, least = found, error

    def _fit(self, form: Form, target: Tensor, stats: Stats | None) -> Operator:
        return form.fit(target.to(self.wide), stats).to(self.weight.dtype)

    def _halves(self, inner: int) -> Tensor:
        gram = None if self.stats is None or self.stats.gram is None else self.stats.gram
        return leading_subspace(self.weight, gram, rank=inner).T @ self.weight.double()

    def _left_for(self, right: Operator) -> Product:
        seen = seen_by_left(right, self.stats)
        return Product(self._fit(self.left, best_left(self.weight, right, self.stats, seen), seen), right)

    def _from_right(self, target: Tensor) -> Product:
        return self._left_for(self._fit(self.right, target, self.stats))

    def _with_left(self, left: Operator) -> Product:
        return Product(left, self._fit(self.right, best_right(self.weight, left), self.stats))

    def _improve_left(self, now: Product) -> Product:
        return self._left_for(now.right)

    def _improve_right(self, now: Product) -> Product:
        # Projection: the metric that L puts on R's rows is left out, which is why it is kept only if it helps.
        return self._left_for(self._with_left(now.left).right)


@dataclass(frozen=True)
class PipeForm(Form):
    """`left` is fitted, then each of its dense factors with `right`, under the statistics of what flows into it."""

    binding: ClassVar[int] = 1
    left: Form
    right: Form

    def __post_init__(self) -> None:
        if not self.right.refits:
            raise FormError(self.needless(self.right))
        if not self.left.dense_leaves:
            raise FormError(
                f"'{self.left}' leaves no dense factor for '| {self.right}' to refit; "
                "low_rank, block_diagonal or dense on the left would work"
            )

    @staticmethod
    def needless(right: Form) -> str:
        """Say why a form does not stand to the right of ``|``."""
        return f"'| {right}' would leave every factor as it is; a form that changes it, e.g. '| int8', would work"

    def __str__(self) -> str:
        return f"{self.left} | {_wrapped(self.right, 2)}"

    @property
    def dense_leaves(self) -> bool:
        return self.right.dense_leaves

    @property
    def wrapper(self) -> bool:
        return self.left.wrapper

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        self.left.check(shape, where)
        made = self.left.outline(shape)
        if made is not None:

            def look(leaf: Dense, path: str) -> Operator:
                self.right.check(leaf.shape, f"the factor {path} of {where}" if where else f"its factor {path}")
                return leaf

            made.map_leaves(look)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        made = self.left.outline(shape, dtype)
        if made is None:
            return None
        known = True

        def replace(leaf: Dense, path: str) -> Operator:
            nonlocal known
            part = self.right.outline(leaf.shape, leaf.dtype)
            known = known and part is not None
            return leaf if part is None else part

        made = made.map_leaves(replace)
        return made if known else None

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        left = self.left.fit(weight, stats)
        plain = left.refit(lambda leaf, path, seen: self.right.fit(leaf.weight, seen), stats)
        if not (isinstance(left, Product) and isinstance(left.left, Dense) and isinstance(plain, Product)):
            return plain
        # The left factor can make up for what refitting changed in the right one: solve for it anew before refitting
        # it.
        seen = seen_by_left(plain.right, stats)
        target = best_left(weight, plain.right, stats, seen).to(_wide(weight.dtype))
        mended = Product(self.right.fit(target, seen).to(weight.dtype), plain.right)
        return min((plain, mended), key=lambda found: data_error(weight, found, stats))
