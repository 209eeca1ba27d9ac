"""Sparse dictionary: every output is a combination of a few atoms out of many."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product
from recast.passes.forms.dictionary_fit import fit_dictionary
from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Dense
from recast.passes.forms.stats import Stats
from recast.passes.forms.unstructured import outline_scattered, scattered
from recast.patterns.errors import FormError

__all__ = ["SparseDictionary"]

# Atoms for each value that an output keeps of them.
_OVERCOMPLETE = 2


@dataclass(frozen=True)
class SparseDictionary(NamedForm):
    """W ≈ S D: D holds k atoms (k, n), each row of S (m, k) combines s of them.

    k n + s m values and a bitmap of m k bits. Where low rank gives all outputs one subspace, here each has its own, of
    atoms that others use too. With data the atoms are found for ``W X``. k = 2 s unless said otherwise, and k from the
    ratio: kept values and bits against 16-bit weights. Target ``triton`` multiplies few tokens by S as it is held;
    elsewhere, and with many, it is written out, so that the form saves bytes, not operations.

    Notes
    -----
    Shopkhoev et al., CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning (2025). Its count hides
    the bitmap in the last bits of the coefficients; here it is stored and counted.

    Examples
    --------
    >>> form = SparseDictionary(atoms=8, nonzeros=2, iterations=3)
    >>> form.fit(torch.randn(32, 16)).nbytes == 4 * (8 * 16 + 2 * 32) + 32 * 8 // 8
    True
    """

    name: ClassVar[str] = "sparse_dictionary"
    summary: ClassVar[str] = "each output combines a few atoms of a dictionary, learned on the data"

    ratio: float | None = field(default=None, metadata={"help": "share of the bytes kept, for 16-bit weights"})
    atoms: int | None = field(default=None, metadata={"help": "how many, in place of the ratio"})
    nonzeros: int | None = field(default=None, metadata={"help": "atoms each output combines; half of them by default"})
    iterations: int = field(default=60, metadata={"help": "rounds of coding and of learning atoms at most"})

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.atoms is None):
            found = "ratio and atoms are given together" if self.atoms else "no parameter is given"
            raise FormError(f"{self.name}: {found}; one of ratio=0.8, atoms=512 would work")
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise FormError(
                f"{self.name}: ratio is {self.ratio}, not positive; 0.8 would keep four fifths of the bytes"
            )
        for name in ("atoms", "nonzeros", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FormError(f"{self.name}: {name} is {value}, not positive; 1 or more would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        atoms = max(1, min(shape) // 4)
        return [cls(atoms=atoms, nonzeros=-(-atoms // 3), iterations=2)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        sizes = sorted({1, max(1, min(shape) // 6), max(1, min(shape) // 3)})
        return [cls(atoms=size, nonzeros=size, iterations=2) for size in sizes]

    @property
    def fixed_point(self) -> bool:
        # Which atoms are best together is a hard problem; another start may end elsewhere.
        return False

    def sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return atoms and non-zeros of each output for a weight (m, n)."""
        m, n = shape
        atoms = self.atoms or int((self.ratio or 0) * m * n / (n + m / _OVERCOMPLETE + m / 16) * (1 + 1e-12))
        return atoms, self.nonzeros or max(1, atoms // _OVERCOMPLETE)

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        atoms, nonzeros = self.sizes(shape)
        if atoms < 1:
            m, n = shape
            least = (n + m / _OVERCOMPLETE + m / 16) / (m * n)
            return f"keeps no atom at ratio {self.ratio}", f"ratio {least * 1.001:.4g} or more would work"
        if nonzeros > atoms:
            return f"has {atoms} atoms, {nonzeros} were asked of each output", f"{atoms} or less would work"
        return None

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Product:
        (m, n), (atoms, nonzeros) = shape, self.sizes(shape)
        dictionary = torch.empty(atoms, n, dtype=dtype, device="meta")
        return Product(outline_scattered((m, atoms), m * nonzeros, dtype), Dense(dictionary))

    def solve(self, weight: Tensor, stats: Stats | None) -> Product:
        atoms, nonzeros = self.sizes((weight.shape[0], weight.shape[1]))
        gram = None if stats is None else stats.gram
        codes, mask, dictionary = fit_dictionary(weight, gram, atoms, nonzeros, self.iterations)
        return Product(scattered(codes.to(weight.dtype), mask), Dense(dictionary.to(weight.dtype).contiguous()))
