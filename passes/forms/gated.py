"""Inputs that are left out token by token: the operator, and what is expected to be lost."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from recast.passes.forms.form import NamedForm
from recast.passes.forms.operator import Cost, Dense, Operator, Refit, holds, stripped
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Gated", "Gating", "column_norms", "gates", "ungated"]

Self = TypeVar("Self", bound="Gating")


@dataclass(frozen=True, eq=False, repr=False)
class Gated(Operator):
    """``y = W (x ⊙ keep(x))``: each token reads only the columns of W whose inputs count for it.

    An input counts if its score, ``|x_j|`` or ``|x_j| norms_j``, is above `threshold`, or without one if no more than
    `kept` - 1 inputs of the same token have a larger score; inputs that tie for the last place all count. `to_dense` is the
    matrix without the gate, so that `apply` is not linear. All targets take the product with zeros in place of what is left
    out; `cost` counts what a kernel would read that gathers columns.

    Attributes
    ----------
    weight
        (m, n), of any kind.
    norms
        (n,), at least float32: norms of the weight's columns. None: all inputs are scored alike.
    kept
        How many of a token's inputs count; with a threshold how many are expected to.
    threshold
        Score that has to be exceeded, the same for all tokens.
    """

    kind: ClassVar[str] = "gated"
    weight: Operator
    norms: Tensor | None
    kept: int
    threshold: float | None = None

    def __post_init__(self) -> None:
        n = self.weight.shape[1]
        if not 0 < self.kept <= n:
            raise ValueError(f"gated: {self.kept} inputs are kept, 1 to {n} would work")
        if self.norms is not None and tuple(self.norms.shape) != (n,):
            raise ValueError(f"gated: norms have shape {tuple(self.norms.shape)}, ({n},) is needed")

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def mask(self, x: Tensor) -> Tensor:
        """Say which inputs count: bool, of the shape of x (..., n)."""
        # At least in float32, so that every target compares the same numbers.
        score = x.abs().to(torch.promote_types(x.dtype, torch.float32))
        if self.norms is not None:
            score = score * self.norms.to(score.dtype)
        if self.threshold is not None:
            return score > self.threshold
        largest = torch.topk(score, self.kept, dim=-1, sorted=False).values
        return score >= largest.amin(-1, keepdim=True)

    def gate(self, x: Tensor) -> Tensor:
        """Return x (..., n) with zeros for the inputs that do not count."""
        return torch.where(self.mask(x), x, 0)

    def apply(self, x: Tensor) -> Tensor:
        return self.weight.apply(self.gate(x))

    def to_dense(self) -> Tensor:
        return self.weight.to_dense()

    def cost(self, tokens: int) -> Cost:
        n = self.shape[1]
        share = self.kept / n
        # Of independent tokens, so many of the columns are wanted by at least one.
        read = 1 - (1 - share) ** tokens
        whole, held = self.weight.cost(tokens), self.weight.cost(0).bytes
        norms = 0 if self.norms is None or not tokens else self.norms.numel() * self.norms.element_size()
        scoring = (1 if self.norms is None else 2) * n * tokens
        return Cost(
            math.ceil(whole.flops * share) + scoring,
            whole.bytes - held + math.ceil(held * read) + norms,
        )

    def own_tensors(self) -> dict[str, Tensor]:
        return {} if self.norms is None else {"norms": self.norms}

    def children(self) -> dict[str, Operator]:
        return {"weight": self.weight}

    def fields(self) -> dict[str, Any]:
        return {"kept": self.kept, "threshold": self.threshold, "weighted": self.norms is not None}

    @classmethod
    def build(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Operator]
    ) -> Operator:
        threshold = fields["threshold"]
        norms = tensors["norms"] if fields["weighted"] else None
        return cls(children["weight"], norms, int(fields["kept"]), None if threshold is None else float(threshold))

    def to(self, dtype: torch.dtype) -> Gated:
        return Gated(self.weight.to(dtype), self.norms, self.kept, self.threshold)

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        # What the gate leaves out differs from token to token: the weight is fitted to all that comes.
        weight = self.weight.refit(fit, stats, f"{path}.weight" if path else "weight")
        norms = None if self.norms is None else column_norms(weight.to_dense())
        return Gated(weight, norms, self.kept, self.threshold)

    def dropped(self, stats: Stats, after: Tensor | None = None) -> float:
        """Expect how much of the output's squares the gate leaves out, over all tokens.

        Inputs are taken for independent, normal with the mean squares that the Gram matrix has.

        Parameters
        ----------
        stats
            With a Gram matrix.
        after
            What the output is multiplied by, (l, m).
        """
        assert stats.gram is not None
        dense = self.to_dense().detach().double()
        dense = dense if after is None else after @ dense
        energy = stats.gram.diagonal().double().clamp_min(0).to(dense.device)
        size = (energy / max(1, stats.tokens)).sqrt()
        if self.norms is not None:
            size = size * self.norms.double()
        live = size > 0
        if not bool(live.any()):
            return 0.0
        threshold = self.threshold
        if threshold is None:
            threshold = _score_at(size, 1 - self.kept / self.shape[1])
        reach = threshold / torch.where(live, size, 1)
        # ∫ z² φ(z) dz over |z| ≤ reach.
        share = torch.erf(reach / math.sqrt(2)) - reach * math.sqrt(2 / math.pi) * torch.exp(-(reach**2) / 2)
        return float((dense.square().sum(0) * energy * torch.where(live, share, 0)).sum())


def _score_at(size: Tensor, share: float) -> float:
    """Find what `share` of the scores lie below: scores normal about zero, of these sizes, half of each."""
    low, high = 0.0, 10 * float(size.max())
    below = torch.where(size > 0, size, torch.finfo(size.dtype).tiny)
    for _ in range(60):
        middle = (low + high) / 2
        found = float(torch.erf(middle / below / math.sqrt(2)).mean())
        low, high = (middle, high) if found < share else (low, middle)
    return (low + high) / 2


def column_norms(weight: Tensor) -> Tensor:
    """Return the norms of a matrix's columns, (n,), at least in float32."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=0)
    return norms


def gates(operator: Operator) -> bool:
    """Whether anything in an operator leaves inputs out token by token."""
    return holds(operator, Gated)


def ungated(operator: Operator) -> Operator:
    """Return the same operator without its gates: the linear map whose matrix `to_dense` is."""
    return stripped(operator, Gated)


@dataclass(frozen=True)
class Gating(NamedForm):
    """Leave out the share `sparsity` of each token's inputs; a subclass says which, by `norms` and `threshold`."""

    # The matrix is held as it is.
    optimal_on_data: ClassVar[bool] = True
    weighted: ClassVar[bool]

    sparsity: float = field(metadata={"help": "share of the inputs that is left out"})

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise FormError(f"{self.name}: sparsity is {self.sparsity}, not between 0 and 1; 0.5 would work")

    @classmethod
    def examples(cls: type[Self], shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(0.5), cls(0.9)]

    @classmethod
    def ladder(cls: type[Self], shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(sparsity) for sparsity in (0.9, 0.65, 0.5, 0.25)]

    def kept(self, features: int) -> int:
        """Return how many of so many inputs count: at least one."""
        return max(1, features - int(self.sparsity * features + 0.5))

    def threshold(self, stats: Stats | None) -> float | None:
        """Return the score that has to be exceeded, None where each token keeps a number of inputs."""
        return None

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Gated:
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.empty(shape[1], dtype=wide, device="meta") if self.weighted else None
        return Gated(Dense(torch.empty(shape, dtype=dtype, device="meta")), norms, self.kept(shape[1]))

    def solve(self, weight: Tensor, stats: Stats | None) -> Gated:
        norms = column_norms(weight) if self.weighted else None
        return Gated(Dense(weight.contiguous()), norms, self.kept(weight.shape[1]), self.threshold(stats))
