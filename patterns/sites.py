"""Nouns of matching: a `Site` worth rewriting, and a `Mismatch` that says why a place is none."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from recast.patterns.contraction import Contraction

__all__ = ["LinearSite", "Mismatch", "Part", "Site", "Use", "source_line"]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a place did not match.

    Parameters
    ----------
    name
        The weight concerned, or the graph value where no weight takes part.
    kind
        What the place is instead: ``embedding``, ``convolution``, ``activation product`` ...
    parameters
        Elements of the weight concerned; 0 where none is.
    reason
        One sentence.
    node
        Name of the graph value reached last.
    where
        File and line of the model's own source, where known.
    flops
        Floating point operations of the place at the captured example's shapes.
    """

    name: str
    kind: str
    parameters: int
    reason: str
    node: str = ""
    where: str = ""
    flops: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a packed weight that the model uses as a matrix of its own: Q, K and V, or gate and up.

    Parameters
    ----------
    name
        ``q``, ``k``, ``v``, ``gate``, ``up``, or a number.
    rows
        Half-open row ranges, in the order in which the part's outputs come.
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)


@dataclasses.dataclass(frozen=True)
class Use:
    """One product in the graph: ``y = contraction(x, weight) + bias``.

    Parameters
    ----------
    node
        The value replaced when this use is rewritten.
    product
        The product itself (differs from `node` where an addition that follows is the bias).
    x, weight
        Operands.
    contraction
        Which dimensions meet.
    bias
        A constant of ``out_features`` elements, or None.
    addend
        Something else that the operation adds (`addmm` with a matrix), or None.
    index
        For a batched weight, which of its matrices; else None.
    weight_shape
        Size of each letter of the contraction's weight; dimensions of size 1 that carry nothing are left out.
    """

    node: fx.Node
    product: fx.Node
    x: fx.Node
    weight: fx.Node
    contraction: Contraction
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    index: int | None = None
    weight_shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """A place worth rewriting.

    Parameters
    ----------
    name
        Name of the module or parameter it belongs to; unique in the program.
    weights
        Original names of the parameters it reads.
    """

    kind: ClassVar[str] = "site"
    name: str
    weights: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"kind": self.kind, "name": self.name, "weights": list(self.weights)}


@dataclasses.dataclass(frozen=True)
class LinearSite(Site):
    """A constant matrix that activations are multiplied by, with every use of it.

    Parameters
    ----------
    out_features, in_features
        Shape of the matrix as ``y = W x``.
    dtype
        Of the matrix as it is multiplied.
    uses
        Products with this matrix, in graph order.
    spelling
        How the first use is written: ``linear``, ``addmm``, ``conv2d`` ...
    parts
        For a packed weight, the matrices in it.
    tied
        Other uses of the same parameter (an embedding lookup) that keep the dense weight alive.
    flops
        Floating point operations of all uses at the captured example's shapes.
    where
        File and line of the model's own source, where known.
    """

    kind: ClassVar[str] = "linear"
    out_features: int = 0
    in_features: int = 0
    dtype: torch.dtype = torch.float32
    uses: tuple[Use, ...] = ()
    spelling: str = "linear"
    parts: tuple[Part, ...] = ()
    tied: tuple[str, ...] = ()
    flops: int = 0
    where: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.out_features, self.in_features

    @property
    def parameters(self) -> int:
        """Elements of the matrix."""
        return self.out_features * self.in_features

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **super().to_dict(),
            "shape": list(self.shape),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "spelling": self.spelling,
            "uses": len(self.uses),
            "parts": [{"name": p.name, "rows": [list(r) for r in p.rows]} for p in self.parts],
            "tied": list(self.tied),
            "parameters": self.parameters,
            "flops": self.flops,
            "where": self.where,
        }


def source_line(node: fx.Node) -> str:
    """``file:line`` of the model's own source for a value, as recorded by capture; empty if not known."""
    trace = node.meta.get("stack_trace")
    lines = [line.strip() for line in str(trace or "").splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/" not in line] or lines
    if not own:
        return ""
    pieces = own[-1].split('"')
    number = pieces[2].replace(",", " ").split() if len(pieces) > 2 else []
    file = "/".join(pieces[1].split("/")[-3:]) if len(pieces) > 1 else ""
    return f"{file}:{number[1]}" if len(number) > 1 else file
