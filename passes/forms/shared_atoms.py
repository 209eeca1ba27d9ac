"""Matrix atoms shared by several layers: each weight is a linear combination of a few matrices."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import Sum
from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import leading_subspace, times
from recast.passes.forms.low_rank import factors
from recast.passes.forms.operator import Cost, Dense, Operator, Refit, matmul_cost
from recast.passes.forms.shared import SharedForm, pooled
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Atoms", "SharedAtoms"]


# Rows that are added up in float64 at a time.
_ROWS = 256


@dataclass(frozen=True, eq=False, repr=False)
class Atoms(Operator):
    """``W = Σ c_s D_s``: coefficients (s,) of this matrix, and atoms that others may hold too."""

    kind: ClassVar[str] = "atoms"
    coefficients: Tensor
    atoms: tuple[Operator, ...]

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(self.atoms) or len({atom.shape for atom in self.atoms}) != 1:
            raise ValueError(f"atoms: {len(self.coefficients)} coefficients for {[a.shape for a in self.atoms]}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.atoms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.atoms[0].dtype

    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.to_dense().to(x.dtype))

    def to_dense(self) -> Tensor:
        total: Tensor | None = None
        for i, atom in enumerate(self.atoms):
            term = atom.to_dense() * self.coefficients[i].to(self.dtype)
            total = term if total is None else total + term
        assert total is not None
        return total

    def cost(self, tokens: int) -> Cost:
        m, n = self.shape
        # The matrix is put together first, whatever the number of tokens.
        return matmul_cost(self.shape, 2 * m * n * (tokens + len(self.atoms)), self.nbytes, self.dtype, tokens)

    def own_tensors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients}

    def children(self) -> dict[str, Operator]:
        return {f"atom{i}": atom for i, atom in enumerate(self.atoms)}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        return cls(tensors["coefficients"], tuple(children[f"atom{i}"] for i in range(len(children))))

    def to(self, dtype: torch.dtype) -> Atoms:
        return replace(self, atoms=tuple(atom.to(dtype) for atom in self.atoms))

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        dot = f"{path}." if path else ""
        return replace(self, atoms=tuple(a.refit(fit, stats, f"{dot}atom{i}") for i, a in enumerate(self.atoms)))


@dataclass(frozen=True)
class SharedAtoms(SharedForm):
    """W_l ≈ Σ_s c_ls D_s (+ a low-rank residual): a few atoms D_s (m, n) for all matrices of a group.

    The atoms are the leading principal components of the matrices taken as vectors, without centering, weighted by the
    group's inputs where there is data; each c_l is then the least-squares solution under its own. A group of fewer
    matrices than `atoms` gets as many atoms as it has matrices, and nothing is lost or saved.

    Notes
    -----
    MASA: matrix atom sharing, its training-free form ("Matrix PCA"), with the residual's whitened low-rank
    approximation. The paper groups consecutive layers whose output distributions drift little: ``across='drift'``, with a
    calibration made with ``drift=True``; by default groups are runs of `group` layers. Weighting the components by the data, and
    solving for the coefficients again, are ours.

    Examples
    --------
    >>> weights = [torch.eye(3), 2 * torch.eye(3), torch.ones(3, 3)]
    >>> made = SharedAtoms(2).fit_together(weights, [None] * 3)
    >>> torch.testing.assert_close([operator.to_dense() for operator in made], weights)
    >>> made[0].atoms[0].weight is made[2].atoms[0].weight
    True
    """

    name: ClassVar[str] = "shared_atoms"
    summary: ClassVar[str] = "each matrix a combination of a few that several layers share (MASA)"

    atoms: int = field(metadata={"help": "shared matrices of a group"})
    rank: int = field(default=0, metadata={"help": "rank of what is added to each for what is left; 0 for nothing"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.atoms < 1:
            raise FormError(f"{self.name}: atoms is {self.atoms}, not positive; a third of the layers is a start")
        if self.rank < 0:
            raise FormError(f"{self.name}: rank is {self.rank}, negative; 0 adds nothing")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(1), cls(2, 1)]

    def problem(self, shape: tuple[int, int]) -> tuple[str, str] | None:
        if self.rank > min(shape):
            return f"has rank at most {min(shape)}, {self.rank} is asked for", f"{min(shape)} or less would work"
        return None

    def idle(self, count: int) -> str | None:
        if self.atoms < count:
            return None
        instead = f"{max(1, count // 3)} would" if count > 1 else "a form of single matrices would"
        return (
            f"{self.atoms} atoms for a group of {count}, which can use {count}: sharing saves no bytes, and every weight is put "
            f"together of them; {instead} save"
        )

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Operator:
        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta")

        atoms = Atoms(empty(1), (Dense(empty(*shape)),))
        if not self.rank:
            return atoms
        thin = factors(empty(shape[0], self.rank), empty(self.rank, shape[1]), dtype)
        return Sum((atoms, thin))

    def solve_together(self, weights: Sequence[Tensor], stats: Sequence[Stats | None]) -> list[Operator]:
        together = pooled(stats)
        gram = None if together is None or together.gram is None else together.gram.to(weights[0].device)
        mixing = _components(weights, gram, min(self.atoms, len(weights)))
        atoms = tuple(Dense(_mixed(weights, column)) for column in mixing)
        made: list[Operator] = []
        for weight, known in zip(weights, stats, strict=True):
            own = None if known is None or known.gram is None else known.gram.to(weight.device)
            coefficients = _coefficients(weight, [atom.weight for atom in atoms], own)
            part = Atoms(coefficients.to(torch.promote_types(weight.dtype, torch.float32)), atoms)
            made.append(self._with_residual(part, weight, own))
        return made

    def _with_residual(self, part: Atoms, weight: Tensor, gram: Tensor | None) -> Operator:
        if not self.rank:
            return part
        rest = weight.to(torch.promote_types(weight.dtype, torch.float32)) - part.to_dense()
        left = leading_subspace(rest, gram, rank=self.rank)
        return Sum((part, factors(left, times(rest.T, left).T, weight.dtype)))


def _mixed(weights: Sequence[Tensor], mixing: Tensor) -> Tensor:
    """A combination of matrices, in their dtype, added up in float64 a few rows at a time."""
    found = torch.empty_like(weights[0], memory_format=torch.contiguous_format)
    for rows in _slabs(found):
        parts = (weight[rows].double() * share for weight, share in zip(weights, mixing, strict=True))
        found[rows] = sum(parts, torch.zeros_like(found[rows], dtype=torch.float64))
    return found


def _inner(weights: Sequence[Tensor], others: Sequence[Tensor], gram: Tensor | None) -> Tensor:
    """Inner products ``tr(A G Bᵀ)`` of matrices with others, float64."""
    found = torch.zeros(len(weights), len(others), dtype=torch.float64, device=weights[0].device)
    for rows in _slabs(weights[0]):
        parts = [other[rows].double() for other in others]
        for i, weight in enumerate(weights):
            seen = weight[rows].double() if gram is None else weight[rows].double() @ gram.double()
            found[i] += torch.stack([(seen * part).sum() for part in parts])
    return found


def _slabs(matrix: Tensor) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, len(matrix), _ROWS)]


def _components(weights: Sequence[Tensor], gram: Tensor | None, count: int) -> Tensor:
    """Combinations (count, L) of the matrices that are their leading principal components, of unit size."""
    inner = _inner(weights, weights, gram)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # Of matrices that depend on each other linearly there are fewer components than were asked for.
    enough = values > values[0].clamp_min(torch.finfo(values.dtype).tiny) * len(weights) * torch.finfo(values.dtype).eps
    mixing: Tensor = (vectors * torch.where(enough, values, torch.inf).rsqrt()).T
    return mixing


def _coefficients(weight: Tensor, atoms: Sequence[Tensor], gram: Tensor | None) -> Tensor:
    """The c that minimises ``‖(W - Σ c_s D_s) X‖``: the normal equations, of the size of the number of atoms."""
    inner = _inner(atoms, [*atoms, weight], gram)
    normal = inner[:, :-1]
    found: Tensor = torch.linalg.pinv((normal + normal.T) / 2, hermitian=True) @ inner[:, -1]
    return found
