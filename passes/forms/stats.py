"""Statistics of what flows into a weight: all that a data-aware fit knows about the data."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.patterns.errors import CalibrationError

if TYPE_CHECKING:
    from recast.passes.forms.operator import Operator

__all__ = [
    "SIZES",
    "Stats",
    "all_finite",
    "gap_errors",
    "less_error",
    "relative_error",
    "row_errors",
    "sizes_of",
    "squared_error",
]

# Sizes of inputs are counted in bins of a 32nd of an octave, 2^-32 to 2^32; the first holds zeros and what is smaller.
_OCTAVE, _REACH = 32, 32
SIZES = 2 * _REACH * _OCTAVE + 1
# Rows whose errors are computed at a time.
_SLAB = 512
# Share of the mean square of the features that keeps a weight as it is in directions that inputs hardly have.
_AIM_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of the n-dimensional inputs of one weight over `tokens` vectors x.

    Attributes
    ----------
    gram
        (n, n) float64, the sum over tokens of x xᵀ (not divided by their number); None where only cheap statistics were
        kept.
    mean
        (n,), the mean of x.
    absmax
        (n,), the largest ``abs(x)`` of each feature; behind an operator without a sample, an upper bound of it.
    tokens
        How many vectors were seen.
    sample
        (k, n), some of the vectors themselves, or None.
    ranges
        (2, n), the smallest and the largest x of each feature, or None.
    sizes
        int64 (`SIZES`,), how many of all inputs have a size within each of the bins of `sizes_of`, or None.
    row_importance, column_importance
        (m,) and (n,), sums over the columns and rows of the weight's empirical Fisher information, the mean of squared
        gradients of a loss (arXiv 2207.00112); None unless calibration was given a loss. They are of one weight, not of
        all that read x.
    cross
        (n, n) float64, the sum over tokens of x̄ xᵀ, where x̄ is what the weight would see in the model as it is and x what
        it sees behind rewritten sites; None where they are the same. A fit then aims at `aimed` weights.
    """

    gram: Tensor | None
    mean: Tensor
    absmax: Tensor
    tokens: int
    sample: Tensor | None = None
    row_importance: Tensor | None = None
    column_importance: Tensor | None = None
    sizes: Tensor | None = None
    cross: Tensor | None = None
    ranges: Tensor | None = None

    @classmethod
    def from_inputs(cls, x: Tensor, *, sample: int = 0) -> Stats:
        """Gather the statistics of inputs (..., n); `sample` of the vectors are kept, evenly spaced.

        Examples
        --------
        >>> stats = Stats.from_inputs(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> stats.gram.tolist(), stats.absmax.tolist(), stats.tokens
        ([[10.0, -10.0], [-10.0, 20.0]], [3.0, 4.0], 2)
        """
        vectors = x.detach().reshape(-1, x.shape[-1]).double()
        if vectors.shape[0] == 0:
            raise CalibrationError("statistics: there is not one input vector; at least one is needed")
        kept = None
        if sample:
            step = max(1, vectors.shape[0] // sample)
            kept = vectors[::step][:sample].to(x.dtype if x.dtype.is_floating_point else torch.float32)
        absmax = vectors.abs().amax(0)
        stats = cls(vectors.T @ vectors, vectors.mean(0), absmax, vectors.shape[0], kept)
        stats.check(vectors.shape[1])
        return replace(stats, sizes=sizes_of(vectors), ranges=torch.stack((vectors.amin(0), vectors.amax(0))))

    @classmethod
    def from_gram(cls, gram: Tensor, tokens: int = 1) -> Stats:
        """Make statistics where only the second moments matter, as inside an alternating fit."""
        # E[x_i^2] bounds mean_i; absmax is at most the root of the sum of squares.
        top = gram.diagonal().clamp_min(0).sqrt()
        return cls(gram, torch.zeros_like(top), top, tokens)

    def size_at(self, share: float) -> float | None:
        """Return the size that `share` of all inputs do not exceed, within 2.2 %, or exactly of the sample; None without both.

        Examples
        --------
        >>> stats = Stats.from_inputs(torch.linspace(-1, 1, 2001).reshape(3, 667))
        >>> 0.49 < stats.size_at(0.5) < 0.51
        True
        """
        if self.sizes is not None:
            reached = self.sizes.cumsum(0)
            wanted = share * float(reached[-1])
            at = int((reached < wanted).sum())
            if at == 0:
                return 0.0
            within = (wanted - float(reached[at - 1])) / float(self.sizes[at])
            return _single(2.0 ** ((at - 1 + within) / _OCTAVE - _REACH))
        if self.sample is None or self.sample.numel() == 0:
            return None
        sizes = self.sample.double().abs().flatten()
        return _single(float(sizes.kthvalue(max(1, math.ceil(share * sizes.numel()))).values))

    def check(self, features: int, where: str | None = None) -> None:
        """Raise CalibrationError unless these are finite statistics of inputs with `features` features."""
        at = f" at {where}" if where else ""
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (features,),
            "absmax": (features,),
            "gram": (features, features),
            "cross": (features, features),
            "column_importance": (features,),
            "sizes": (SIZES,),
            "ranges": (2, features),
        }
        if self.row_importance is not None:
            shapes["row_importance"] = (self.row_importance.numel(),)
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise CalibrationError(
                    f"statistics: {name} has shape {tuple(value.shape)} but the weight{at} takes {features} features; "
                    "they belong to another weight: calibrate this one"
                )
            if not all_finite(value):
                raise CalibrationError(
                    f"statistics: {name}{at} is not finite; calibration data that overflows is of no use, "
                    "check the batches or calibrate in float32"
                )
        if self.sample is not None and (self.sample.dim() != 2 or self.sample.shape[1] != features):
            raise CalibrationError(
                f"statistics: sample{at} has shape {tuple(self.sample.shape)}; (anything, {features}) would work"
            )
        if self.sample is not None and not all_finite(self.sample):
            raise CalibrationError(f"statistics: sample{at} is not finite; check the batches, or leave it out")
        for name in ("row_importance", "column_importance"):
            value = getattr(self, name)
            if value is not None and value.numel() and float(value.min()) < 0:
                raise CalibrationError(
                    f"statistics: {name}{at} holds {float(value.min()):.3g}; sums of squares, zero or more, would work"
                )

    @property
    def features(self) -> int:
        """How many features the inputs have."""
        return self.mean.shape[0]

    @property
    def deficient(self) -> bool:
        """Whether there were fewer vectors than features, so that the Gram matrix says nothing of some directions."""
        return self.gram is not None and self.tokens < self.features

    @property
    def shrinkage(self) -> float:
        """Share of the Gram matrix that `regular` replaces by its diagonal: 0 unless `deficient`.

        The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero (2010) of the inputs scaled to equal size, which
        makes the expected squared error of the matrix small for normal inputs.

        Examples
        --------
        >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        >>> few, many = Stats.from_inputs(x[:8]).shrinkage, Stats.from_inputs(x).shrinkage
        >>> 0.5 < few <= 1 and many == 0
        True
        """
        if not self.deficient or self.gram is None:
            return 0.0
        diagonal = self.gram.diagonal().double()
        live = diagonal > 0
        p, t = int(live.sum()), self.tokens
        scale = torch.where(live, torch.where(live, diagonal, 1).rsqrt(), 0)
        squares = float((self.gram.double() * scale * scale.unsqueeze(1)).square().sum())
        if p < 2 or squares <= p:
            return 1.0 if p > 1 else 0.0
        return min(1.0, ((1 - 2 / p) * squares + p * p) / ((t + 1 - 2 / p) * (squares - p)))

    @cached_property
    def regular(self) -> Stats:
        """The statistics that a fit should see: these, or if they are `deficient` ones with a Gram matrix of full rank.

        That is ``(1 - s) G + s diag(G)`` with s the `shrinkage`: directions that the data does not show count as if inputs
        were independent there, instead of not at all. Inputs that are always zero stay so.
        """
        if not self.deficient or self.gram is None:
            return self

        def shrunk(moments: Tensor) -> Tensor:
            found = (1 - self.shrinkage) * moments.double()
            found.diagonal().copy_(moments.diagonal())
            return found

        return replace(self, gram=shrunk(self.gram), cross=None if self.cross is None else shrunk(self.cross))

    def aimed(self, weight: Tensor) -> Tensor:
        """Return the weight (m, n) that a fit should come near to on these inputs, of the same dtype.

        Behind rewritten sites that is ``W̃ = W (X̄ Xᵀ + λ) (X Xᵀ + λ)⁻¹``, for ``‖W X̄ - Ŵ X‖²`` is ``‖(W̃ - Ŵ) X‖²`` and what
        no Ŵ can change; λ is a hundredth of the mean square of the features. Elsewhere it is the weight itself.

        Examples
        --------
        >>> stats = Stats.from_inputs(torch.eye(3))
        >>> seen = replace(stats, cross=2 * stats.gram)  # inputs have become half as large
        >>> expected = (2 + 0.01) / (1 + 0.01) * torch.eye(3)
        >>> torch.testing.assert_close(seen.aimed(torch.eye(3)), expected)
        """
        if self.cross is None or self.gram is None:
            return weight
        gram, cross = self.gram.double(), self.cross.double()
        ridge = _AIM_DAMPING * gram.diagonal().mean()
        if not ridge > 0:
            return weight
        eye = ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        turned: Tensor = torch.linalg.solve(gram + eye, cross.T + eye).T
        wide = turned.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        found: Tensor = (weight.to(wide.dtype) @ wide).to(weight.dtype)
        return found

    @cached_property
    def hash(self) -> str:
        """Digest of every value, equal for equal statistics: a key for what was fitted with them."""
        digest = hashlib.sha256(str(self.tokens).encode())
        for name in ("gram", "mean", "absmax", "sample", "row_importance", "column_importance"):
            value = getattr(self, name)
            digest.update(name.encode())
            if value is not None:
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for value in (self.sizes, self.cross, self.ranges):  # statistics of files that lack them keep their digest
            if value is not None:
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def through(self, operator: Operator) -> Stats:
        """Return the statistics of ``operator.apply(x)``: A G Aᵀ, A mean, and so on."""
        matrix = operator.to_dense().detach().double().to(self.mean.device)
        gram = None
        if self.gram is not None:
            gram = matrix @ self.gram.double() @ matrix.T
            gram = (gram + gram.T) / 2
        sample = None
        if self.sample is not None:
            sample = operator.apply(self.sample.to(operator.dtype)).to(self.sample.dtype)
        absmax = matrix.abs() @ self.absmax.double()
        if gram is not None:
            # Cauchy-Schwarz gives a second bound: no value exceeds the root of the sum of all squares.
            absmax = torch.minimum(absmax, gram.diagonal().clamp_min(0).sqrt())
        mean = matrix @ self.mean.double()
        return replace(
            self,
            gram=gram,
            mean=mean,
            absmax=absmax,
            sample=sample,
            column_importance=None,
            sizes=None,
            cross=None,
            ranges=None,
        )

    def part(self, features: slice) -> Stats:
        """Return the statistics of some of the features, as one block of a block-diagonal operator sees them."""
        return Stats(
            None if self.gram is None else self.gram[features, features],
            self.mean[features],
            self.absmax[features],
            self.tokens,
            None if self.sample is None else self.sample[:, features],
            column_importance=None if self.column_importance is None else self.column_importance[features],
            ranges=None if self.ranges is None else self.ranges[:, features],
        )


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; each is looked at only where their sum is not finite, which may have overflown.

    Examples
    --------
    >>> all_finite(torch.full((4,), 3e38)), all_finite(torch.tensor([1.0, -torch.inf]))
    (True, False)
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def sizes_of(x: Tensor) -> Tensor:
    """Count the sizes ``abs(x)`` of inputs of any shape in bins of equal ratio, int64 (`SIZES`,); counts of parts add up."""
    sizes = x.detach().abs().double().flatten()
    bins = (torch.log2(sizes).clamp_(-_REACH - 1, _REACH) + _REACH).mul_(_OCTAVE).floor_()
    return torch.bincount(bins.add_(1).clamp_(0, SIZES - 1).long(), minlength=SIZES).cpu()


def _single(value: float) -> float:
    """Round to float32, in which inputs are compared with it."""
    return float(torch.tensor(value, dtype=torch.float32))


def row_errors(difference: Tensor, gram: Tensor | None) -> Tensor:
    """Squared error of each output row, (m,) float64: the row norms of `difference` (m, n) under the Gram matrix."""
    total = torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
    # Slabs of rows bound the memory that the float64 copies take.
    for start in range(0, difference.shape[0], _SLAB):
        slab = difference[start : start + _SLAB].double()
        weighted = slab if gram is None else slab @ gram.to(slab.device, torch.float64)
        total[start : start + _SLAB] = (weighted * slab).sum(1)
    return total.clamp_min(0)


def less_error(one: Tensor, other: Tensor, gram: Tensor | None) -> Tensor:
    """Whether the error of each row of `one` is less than that of `other`, both (m, n), under a Gram matrix; bool (m,).

    ``aᵀG a - bᵀG b`` is ``(a - b)ᵀG (a + b)``, one product with G in place of two, and none for rows that are alike.
    """
    found = torch.zeros(len(one), dtype=torch.bool, device=one.device)
    for rows in (one != other).any(1).nonzero().squeeze(1).split(_SLAB):  # type: ignore[no-untyped-call]
        a, b = one[rows].double(), other[rows].double()
        apart = a - b
        weighted = apart if gram is None else apart @ gram.to(apart.device, torch.float64)
        found[rows] = (weighted * (a + b)).sum(1) < 0
    return found


def gap_errors(weight: Tensor, dense: Tensor, gram: Tensor | None) -> Tensor:
    """`row_errors` of the difference of two matrices (m, n), which is never there as a whole."""
    pairs = zip(torch.split(weight, _SLAB), torch.split(dense, _SLAB), strict=True)
    return torch.cat([row_errors(a.double() - b.double(), gram) for a, b in pairs])


def squared_error(weight: Tensor, dense: Tensor, gram: Tensor | None) -> float:
    """``‖(W - Ŵ)X‖²`` of two matrices (m, n), or ``‖W - Ŵ‖²``, in float64."""
    return float(gap_errors(weight, dense, gram).sum())


def relative_error(weight: Tensor, operator: Operator, stats: Stats | None = None) -> tuple[float, float | None]:
    """Measure how far an operator is from the weight it stands for.

    Parameters
    ----------
    weight
        (m, n), what was asked for.
    operator
        What was fitted, of the same shape.
    stats
        Statistics of the inputs; the second result needs their Gram matrix.

    Returns
    -------
    ``‖W - Ŵ‖ / ‖W‖`` and, with a Gram matrix, ``‖(W - Ŵ)X‖ / ‖WX‖`` (otherwise None), Frobenius norms; 0 for 0 / 0.

    Examples
    --------
    >>> from recast.passes.forms import Dense
    >>> relative_error(torch.eye(2), Dense(torch.diag(torch.tensor([1.0, 0.0]))))
    (0.7071067811865476, None)
    """
    weight = weight.detach()
    if tuple(weight.shape) != operator.shape:
        raise ValueError(f"relative_error: weight {tuple(weight.shape)} and operator {operator.shape} differ in shape")
    dense = operator.to_dense().detach().to(weight.device)
    plain = _ratio(dense, weight, None)
    return plain, None if stats is None or stats.gram is None else _ratio(dense, weight, stats.gram)


def _ratio(dense: Tensor, weight: Tensor, gram: Tensor | None) -> float:
    error, size = squared_error(weight, dense, gram), float(row_errors(weight, gram).sum())
    if error == 0:
        return 0.0
    return math.sqrt(error / size) if size > 0 else math.inf
