"""Integer weights and a few outliers beside them that coordinate descent finds together."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from recast.kernels.quantized_matmul import reference
from recast.passes.forms.algebra import Sum
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.form import NamedForm, Scalar, data_error
from recast.passes.forms.int8 import Int8
from recast.passes.forms.integer import Integer
from recast.passes.forms.operator import Dense, Operator
from recast.passes.forms.pruning import top_of_all
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.rounding import Snap, integer_snap, sweep, unit_gram, unrounded
from recast.passes.forms.scaled import OverBase
from recast.passes.forms.stats import Stats, row_errors
from recast.passes.forms.unstructured import check_storage, outline_scattered, scattered
from recast.patterns.errors import FormError

__all__ = ["QuantEaseOutliers"]

# Above this size the largest eigenvalue is found by Lanczos' method, to so much of itself.
_DIRECT, _EIGEN = 512, 1e-3
# Alternations end after so many in a row that do not lower the error by this share.
_PATIENCE, _GAIN = 3, 1e-4


@dataclass(frozen=True)
class QuantEaseOutliers(OverBase):
    """``W ≈ Q + H``: codes Q of an integer form, and H with a share of the values as they are, anywhere or in whole columns.

    The largest values of W are taken out, scales are chosen for the rest, and it is rounded by GPTQ. From there in turns:
    each input is rounded anew to what is best while all else stays, and H takes a step down the gradient, of length
    ``1 / L`` with ``L = 2 λ_max(G)``, of which its largest values are kept (iterative hard thresholding). Neither step
    raises ``‖(W - Q - H) X‖``. As without outliers every third turn leaves values unrounded, and H alone; the best pair
    that was met is kept, so the result is never worse than the start. Without data it is the start, rounded to nearest.

    Notes
    -----
    Behdin et al., QuantEase: Optimization-based Quantization for Language Models (2023): 1 % of outliers over three bits,
    thirty turns. Their outliers are of the whole matrix, or the columns of the largest norm ("structured").

    Examples
    --------
    >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> weight[3, 5] = 40.0
    >>> plain, beside = QuantEaseOutliers().inner().fit(weight), QuantEaseOutliers().fit(weight)
    >>> beside.to_dense()[3, 5].item()
    40.0
    >>> bool((beside.to_dense() - weight).norm() < 0.9 * (plain.to_dense() - weight).norm())
    True
    """

    name: ClassVar[str] = "quantease_outliers"
    summary: ClassVar[str] = (
        "integers by coordinate descent, and a few values or columns beside them that are not rounded"
    )

    base: str = field(default="int3", metadata={"help": "the integer form of what is rounded, as text"})
    outliers: float = field(default=0.01, metadata={"help": "share of the values, or columns, that are not rounded"})
    structured: bool = field(default=False, metadata={"help": "outliers are whole columns, which are cheaper to read"})
    iterations: int = field(default=30, metadata={"help": "turns at most"})
    storage: str = field(
        default="tiled", metadata={"help": "of values anywhere: 'tiled', or 'bitmap' for many of them"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outliers < 1:
            raise FormError(f"{self.name}: outliers is {self.outliers}, not in (0, 1); 0.01 would work")
        if self.iterations < 1:
            raise FormError(f"{self.name}: iterations is {self.iterations}, not positive; 30 would work")
        check_storage(self.name, self.storage)

    @property
    def without_data(self) -> str | None:
        return f"{self} rounds to nearest beside the largest values"

    @classmethod
    def positional(cls, values: list[Scalar]) -> list[str]:
        # quantease_outliers(0.01, 'int4') and quantease_outliers('int4', 0.01).
        first = ["base", "outliers"] if values and isinstance(values[0], str) else ["outliers", "base"]
        return [*first, "structured", "iterations", "storage"][: len(values)]

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls("int3(group=20)", iterations=5), cls("int2(group=20)", 0.05, structured=True, iterations=5)]

    @classmethod
    def ladder(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls("int3(group=20)", share, iterations=5) for share in (0.01, 0.1, 0.4)]

    @property
    def dense_leaves(self) -> bool:
        return True

    def inner(self) -> Integer | Int8:
        base = super().inner()
        if not isinstance(base, Integer | Int8):
            raise FormError(f"{self.name}: base {self.base!r} is no integer form; 'int3' would work")
        # Where no rounding is asked for, the start is GPTQ's.
        return replace(base, rounding="gptq") if base.rounding == "nearest" else base

    def count(self, shape: tuple[int, int]) -> int:
        """Return how many values, or columns, of a weight (m, n) are not rounded: at least one."""
        of = shape[1] if self.structured else shape[0] * shape[1]
        return max(1, int(self.outliers * of + 0.5))

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Sum:
        (m, n), count = shape, self.count(shape)
        beside: Operator
        if self.structured:
            values = Dense(torch.empty(m, count, dtype=dtype, device="meta"))
            beside = ColumnSparse(values, torch.empty(count, dtype=torch.int32, device="meta"), n)
        else:
            beside = outline_scattered(shape, count, dtype, self.storage)
        return Sum((self.inner().outline(shape, dtype), beside))

    def solve(self, weight: Tensor, stats: Stats | None) -> Sum:
        base, count = self.inner(), self.count((weight.shape[0], weight.shape[1]))
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        taken = wide * _largest(wide, count, self.structured)
        first = base.solve(wide - taken, stats).to(weight.dtype)
        start = self._sum(first, taken, count, weight.dtype)
        if stats is None or stats.gram is None:
            return start
        # Codes within half of their range stay there.
        reduced = isinstance(base, Int8) and base.reduce_range
        scale, zero = first.scale.T, first.zero
        offsets = torch.zeros_like(scale) if zero is None else zero.T.to(scale.dtype)
        width = wide.shape[1] if first.group is None else first.group
        snap = integer_snap(
            scale.contiguous(), offsets.contiguous(), width, reference.code_range(first.bits, zero is None, reduced)
        )
        begun = first.to(wide.dtype).to_dense()
        found, taken = alternate(
            wide, stats.gram.to(weight.device), begun, taken, snap, count, self.structured, self.iterations
        )
        codes = reference.quantize(found, first.scale, zero, bits=first.bits, group=first.group, reduce_range=reduced)
        ended = self._sum(replace(first, values=codes), taken, count, weight.dtype)
        return min((start, ended), key=lambda operator: data_error(weight, operator, stats))

    def _sum(self, rounded: Quantized, taken: Tensor, count: int, dtype: torch.dtype) -> Sum:
        mask = _largest(taken, count, self.structured)
        beside: Operator
        if self.structured:
            columns = mask[0].nonzero()[:, 0]
            beside = ColumnSparse(Dense(taken[:, columns].to(dtype)), columns.to(torch.int32), taken.shape[1])
        else:
            beside = scattered(taken.to(dtype), mask, self.storage)
        return Sum((rounded, beside))


def alternate(
    weight: Tensor,
    gram: Tensor,
    rounded: Tensor,
    taken: Tensor,
    snap: Snap,
    count: int,
    structured: bool,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Change codes and outliers in turns, each for the better; return the best pair that was met.

    Parameters
    ----------
    weight, rounded, taken
        (m, n): what is approximated, values of the grid, and the outliers to begin with, zeros elsewhere.
    gram
        (n, n), of the inputs.
    snap
        The grid.
    count, structured
        How many values are outliers, or columns.
    iterations
        At most so many.
    """
    g = unit_gram(gram, weight.dtype)
    largest = _largest_eigenvalue(g)
    if not largest > 0:
        return rounded, taken
    # Inputs first, so that each is one stretch of memory.
    target, beside, codes = weight.T.contiguous(), taken.T.contiguous(), rounded.T.contiguous().clone()

    def error() -> float:
        return float(row_errors((target - codes - beside).T, gram).sum())

    best, least, since = (codes.clone(), beside), error(), 0
    for number in range(iterations):
        free = unrounded(number, iterations)
        sweep(target - beside, codes, g, None if free else snap)
        if free:
            continue
        moved = beside + g @ (target - codes - beside) / largest
        beside = moved * _largest(moved.T, count, structured).T
        found = error()
        since = 0 if found < (1 - _GAIN) * least else since + 1
        if found < least:
            best, least = (codes.clone(), beside), found
        if since == _PATIENCE:
            break
    return best[0].T, best[1].T


def _largest(values: Tensor, count: int, columns: bool) -> Tensor:
    """Mark the `count` largest values of (m, n), or all of the columns with the largest norms."""
    if columns:
        mask = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        mask[values.square().sum(0).topk(count).indices] = True
        return mask.expand(values.shape)
    return top_of_all(values.abs(), count)


def _largest_eigenvalue(gram: Tensor) -> float:
    """Return the largest eigenvalue of a Gram matrix; of a large one no less than it, and at most 0.2 % more."""
    if len(gram) <= _DIRECT:
        return float(torch.linalg.eigvalsh(gram.double())[-1])
    import scipy.sparse.linalg

    def product(vector: Any) -> Any:  # in the dtype of the matrix, which is large and not copied
        moved = torch.from_numpy(vector).reshape(-1).to(gram.device, gram.dtype)
        return (gram @ moved).cpu().double().numpy()

    operator = scipy.sparse.linalg.LinearOperator(gram.shape, matvec=product, dtype="float64")
    start = torch.ones(len(gram), dtype=torch.float64).numpy()
    found = scipy.sparse.linalg.eigsh(operator, k=1, v0=start, tol=_EIGEN, return_eigenvectors=False)
    return float(found[0]) * (1 + _EIGEN)
