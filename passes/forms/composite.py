"""Sums, products and pipes of forms, and how any of them is fitted."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product, Sum
from recast.passes.forms.alternating import fit_product, fit_sum, wide_dtype
from recast.passes.forms.form import Form, data_error
from recast.passes.forms.linear_algebra import behind, best_left
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.shared import pooled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["PipeForm", "ProductForm", "SumForm"]


def _wrapped(form: Form, binding: int) -> str:
    return f"({form})" if form.binding < binding else str(form)


def _refuse_shared(parts: Sequence[Form], what: str) -> None:
    """A group is fitted as a whole, and not by taking turns with something that each of its members has for itself."""
    for part in parts:
        if part.shared_part is not None:
            raise FormError(
                f"{what}: '{part}' is fitted to a group of matrices and stands alone or left of '|'; "
                "its own parameters may add what is wanted, e.g. shared_atoms(8, rank=4)"
            )


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
        _refuse_shared(self.terms, "sum")

    def __str__(self) -> str:
        return " + ".join(_wrapped(term, 3) for term in self.terms)

    @property
    def dense_leaves(self) -> bool:
        return any(term.dense_leaves for term in self.terms)

    @property
    def needs_loss(self) -> bool:
        return any(term.needs_loss for term in self.terms)

    @property
    def needs_data(self) -> bool:
        return any(term.needs_data for term in self.terms)

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        for term in self.terms:
            term.check(shape, where)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator | None:
        parts = [term.outline(shape, dtype) for term in self.terms]
        known = tuple(part for part in parts if part is not None)
        return Sum(known) if len(known) == len(parts) else None

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        return fit_sum(self.terms, weight, stats)


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
        _refuse_shared(self.factors, "product")

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
        shapes = self.shapes((weight.shape[0], weight.shape[1]))
        return fit_product(self.factors, shapes, weight, stats)


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
            raise FormError(self._nothing())
        if self.right.shared_part is not None:
            raise FormError(
                f"'| {self.right}' would share factors of different layers; '{self.right}' alone would work"
            )

    def _nothing(self) -> str:
        return (
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
    def needs_loss(self) -> bool:
        return self.left.needs_loss or self.right.needs_loss

    @property
    def needs_data(self) -> bool:
        return self.left.needs_data or self.right.needs_data

    @property
    def wrapper(self) -> bool:
        return self.left.wrapper

    def check(self, shape: tuple[int, int], where: str | None = None) -> None:
        self.left.check(shape, where)
        made = self.left.outline(shape)
        if made is not None:
            if not made.has_dense_leaves():
                raise FormError(self._nothing())

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

    @property
    def shared_part(self) -> Form | None:
        return self.left.shared_part

    def solve(self, weight: Tensor, stats: Stats | None) -> Operator:
        left = self.left.fit(weight, stats)
        return self._mended(
            left, left.refit(lambda leaf, _, seen: self.right.fit(leaf.weight, seen), stats), weight, stats
        )

    def fit_together(
        self, weights: Sequence[Tensor], stats: Sequence[Stats | None], *, where: Sequence[str] | None = None
    ) -> list[Operator]:
        if self.shared_part is None:
            return super().fit_together(weights, stats, where=where)
        lefts = self.left.fit_together(weights, stats, where=where)
        # What is held in common is refitted once, under the statistics of all that flows into it.
        flows: dict[int, list[Stats | None]] = {}

        def note(leaf: Dense, _: str, seen: Stats | None) -> Operator:
            flows.setdefault(id(leaf.weight), []).append(seen)
            return leaf

        for left, known in zip(lefts, stats, strict=True):
            left.refit(note, known)
        made: dict[int, Operator] = {}

        def replace(leaf: Dense, _: str, seen: Stats | None) -> Operator:
            key = id(leaf.weight)
            if key not in made:
                made[key] = self.right.fit(leaf.weight, seen if len(flows[key]) == 1 else pooled(flows[key]))
            return made[key]

        plain = [left.refit(replace, known) for left, known in zip(lefts, stats, strict=True)]
        return [
            self._mended(left, found, weight.detach(), known)
            for left, found, weight, known in zip(lefts, plain, weights, stats, strict=True)
        ]

    def _mended(self, left: Operator, plain: Operator, weight: Tensor, stats: Stats | None) -> Operator:
        """Solve anew for the left factor of a product, which can make up for what refitting changed in the right one."""
        if not (isinstance(left, Product) and isinstance(left.left, Dense) and isinstance(plain, Product)):
            return plain
        seen, gram = behind(plain.right, stats)
        target = best_left(weight, plain.right, stats, gram).to(wide_dtype(weight.dtype))
        mended = Product(self.right.fit(target, seen).to(weight.dtype), plain.right)
        return min((plain, mended), key=lambda found: data_error(weight, found, stats))
