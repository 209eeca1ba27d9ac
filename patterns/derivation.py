"""`Derivation`: how a weight that a rewrite made follows from original ones, as a formula that can be read and computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recast.patterns.errors import RecastError

__all__ = ["Derivation"]

Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Derivation:
    """A formula over original weights. Made by the functions of this class, which simplify what cancels.

    Parameters
    ----------
    op
        ``weight``, ``cat``, ``rows``, ``scale_rows`` ...: a name of `OPERATIONS`.
    operands
        Formulas that enter.
    options
        Numbers and names, by position.
    shape
        Of the result.

    Examples
    --------
    >>> q, k = Derivation.weight("q.weight", (4, 3)), Derivation.weight("k.weight", (2, 3))
    >>> merged = Derivation.cat(q, k)
    >>> str(merged), merged.sources
    ('cat(q.weight, k.weight)', ('q.weight', 'k.weight'))
    >>> str(merged.rows((4, 6)))
    'k.weight'
    """

    op: str
    operands: tuple[Derivation, ...]
    options: tuple[Any, ...]
    shape: tuple[int, ...]

    # ------------------------------------------------------------------ making

    @staticmethod
    def weight(name: str, shape: Iterable[int]) -> Derivation:
        """An original weight itself."""
        return Derivation("weight", (), (name,), tuple(int(s) for s in shape))

    @staticmethod
    def zeros(*shape: int) -> Derivation:
        """Nothing but zeros: the bias of a linear that has none."""
        return Derivation("zeros", (), shape, shape)

    @staticmethod
    def fitted(how: str, shape: Iterable[int], *operands: Derivation) -> Derivation:
        """What a fit to data made of some weights; `how` says in words which. It cannot be computed again."""
        return Derivation("fitted", operands, (how,), tuple(int(s) for s in shape))

    @staticmethod
    def cat(*pieces: Derivation) -> Derivation:
        """Pieces below each other; neighbouring rows of the same matrix become one piece again."""
        joined: list[Derivation] = []
        flat = [p for piece in pieces for p in (piece.operands if piece.op == "cat" else (piece,))]
        for piece in flat:
            before = joined[-1] if joined else None
            if before is not None and "rows" == before.op == piece.op and before.operands == piece.operands:
                joined[-1] = before.operands[0].rows(*before.options, *piece.options)
            elif before is not None and "zeros" == before.op == piece.op:
                joined[-1] = Derivation.zeros(before.shape[0] + piece.shape[0], *piece.shape[1:])
            else:
                joined.append(piece)
        if len(joined) == 1:
            return joined[0]
        return Derivation("cat", tuple(joined), (), (sum(p.shape[0] for p in joined), *joined[0].shape[1:]))

    def rows(self, *ranges: Sequence[int]) -> Derivation:
        """Half-open ranges of rows, in the order given."""
        merged: list[tuple[int, int]] = []
        for start, stop in ranges:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], int(stop))
            else:
                merged.append((int(start), int(stop)))
        if merged == [(0, self.shape[0])]:
            return self
        count = sum(stop - start for start, stop in merged)
        if self.op == "zeros":
            return Derivation.zeros(count, *self.shape[1:])
        if self.op == "cat" and (whole := self._pieces(merged)) is not None:
            return Derivation.cat(*whole)
        return Derivation("rows", (self,), tuple(merged), (count, *self.shape[1:]))

    def _pieces(self, ranges: list[tuple[int, int]]) -> list[Derivation] | None:
        """Pieces of a `cat` that ranges take whole or in part, if each range lies within one or takes several whole."""
        bounds, at = [], 0
        for piece in self.operands:
            bounds.append((at, at + piece.shape[0], piece))
            at += piece.shape[0]
        taken: list[Derivation] = []
        for start, stop in ranges:
            for low, high, piece in bounds:
                a, b = max(low, start), min(high, stop)
                if a < b:
                    taken.append(piece.rows((a - low, b - low)))
        return taken

    def permute(self, *order: int) -> Derivation:
        """Dimensions in another order."""
        if list(order) == sorted(order):
            return self
        if self.op == "permute":
            return self.operands[0].permute(*(self.options[d] for d in order))
        return Derivation("permute", (self,), tuple(order), tuple(self.shape[d] for d in order))

    def reshape(self, *shape: int) -> Derivation:
        """The same elements in another shape."""
        if shape == self.shape:
            return self
        if self.op == "reshape":
            return self.operands[0].reshape(*shape)
        return Derivation("reshape", (self,), shape, shape)

    def select(self, dim: int, index: int) -> Derivation:
        """One slice along a dimension, the dimension dropped."""
        return Derivation("select", (self,), (dim, index), (*self.shape[:dim], *self.shape[dim + 1 :]))

    def cast(self, dtype: torch.dtype) -> Derivation:
        """Rounded to another dtype."""
        return Derivation("cast", (self,), (str(dtype).removeprefix("torch."),), self.shape)

    def scale(self, factor: float) -> Derivation:
        """Times a number."""
        if factor == 1 or self.op == "zeros":
            return self
        if self.op == "scale":
            return self.operands[0].scale(self.options[0] * factor)
        return Derivation("scale", (self,), (float(factor),), self.shape)

    def shift(self, number: float) -> Derivation:
        """Plus a number."""
        return self if number == 0 else Derivation("shift", (self,), (float(number),), self.shape)

    def scale_rows(self, vector: Derivation) -> Derivation:
        """Each slice along the first dimension times its element of a vector."""
        return self if self.op == "zeros" else Derivation("scale_rows", (self, vector), (), self.shape)

    def scale_columns(self, vector: Derivation) -> Derivation:
        """Each slice along the last dimension times its element of a vector."""
        return Derivation("scale_columns", (self, vector), (), self.shape)

    def rsqrt(self, eps: float) -> Derivation:
        """``1 / sqrt(self + eps)``."""
        return Derivation("rsqrt", (self,), (float(eps),), self.shape)

    def centred(self, dim: int) -> Derivation:
        """Less its mean along a dimension."""
        dim %= len(self.shape)
        if self.op == "zeros" or (self.op == "centred" and self.options == (dim,)):
            return self
        return Derivation("centred", (self,), (dim,), self.shape)

    def __add__(self, other: Derivation) -> Derivation:
        if self.op == "zeros":
            return other
        return self if other.op == "zeros" else Derivation("add", (self, other), (), self.shape)

    def __sub__(self, other: Derivation) -> Derivation:
        return self + other.scale(-1.0)

    def __matmul__(self, other: Derivation) -> Derivation:
        if other.op == "zeros":
            return Derivation.zeros(self.shape[0], *other.shape[1:])
        return Derivation("matmul", (self, other), (), (self.shape[0], *other.shape[1:]))

    # ------------------------------------------------------------------ reading

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the weights it is made of, each once."""
        if self.op == "weight":
            return (str(self.options[0]),)
        return tuple(dict.fromkeys(name for operand in self.operands for name in operand.sources))

    def value(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Compute it. Arithmetic is in float64, so that the caller rounds once; moves keep the dtype.

        Raises
        ------
        KeyError
            A weight is not among those given.
        """
        if self.op == "weight":
            return weights[self.options[0]].detach()
        with torch.no_grad():
            return OPERATIONS[self.op](*(operand.value(weights) for operand in self.operands), *self.options)

    def substitute(self, known: Mapping[str, Derivation]) -> Derivation:
        """The same formula with weights replaced by what they were made of."""
        if self.op == "weight":
            return known.get(self.options[0], self)
        if not self.operands:
            return self
        first, *others = (operand.substitute(known) for operand in self.operands)
        if self.op == "cat":
            return Derivation.cat(first, *others)
        if self.op == "add":
            return first + others[0]
        if self.op == "matmul":
            return first @ others[0]
        if self.op == "fitted":
            return Derivation.fitted(self.options[0], self.shape, first, *others)
        if self.op == "cast":
            return first.cast(getattr(torch, self.options[0]))
        made: Derivation = getattr(first, self.op)(*others, *self.options)
        return made

    def __str__(self) -> str:
        if self.op == "weight":
            return str(self.options[0])
        if self.op == "rows":
            return f"{self.operands[0]}[{', '.join(f'{a}:{b}' for a, b in self.options)}]"
        inner = [str(operand) for operand in self.operands]
        inner += [f"{o:.6g}" if isinstance(o, float) else str(o) for o in self.options]
        return f"{self.op}({', '.join(inner)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "op": self.op,
            "operands": [operand.to_dict() for operand in self.operands],
            "options": [list(o) if isinstance(o, tuple) else o for o in self.options],
            "shape": list(self.shape),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Derivation:
        """Read what `to_dict` gives.

        Raises
        ------
        RecastError
            The operation is none that a derivation may name.
        """
        if data["op"] not in OPERATIONS and data["op"] != "weight":
            raise RecastError(
                f"derivation: there is no operation '{data['op']}'; known: weight, {', '.join(OPERATIONS)}"
            )
        return Derivation(
            str(data["op"]),
            tuple(Derivation.from_dict(operand) for operand in data["operands"]),
            tuple(tuple(int(i) for i in o) if isinstance(o, list) else o for o in data["options"]),
            tuple(int(s) for s in data["shape"]),
        )


def _cat(*pieces: Tensor) -> Tensor:
    known = [p for p in pieces if p.dtype != torch.float64]  # zeros and sums come in float64; moves keep theirs
    dtype = known[0].dtype if len(known) == len(pieces) else torch.float64
    return torch.cat([p.to(device=pieces[0].device, dtype=dtype) for p in pieces])


def _not_computed(*values: Any) -> Tensor:
    raise RecastError(f"derivation: '{values[-1]}' follows from data, not from weights alone; fit it again")


def _wide(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def computed(*values: Any) -> Tensor:
        return operation(*(v.double() if isinstance(v, Tensor) else v for v in values))

    return computed


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "zeros": lambda *shape: torch.zeros(shape, dtype=torch.float64),
    "cat": _cat,
    "fitted": _not_computed,
    "rows": lambda x, *ranges: torch.cat([x[a:b] for a, b in ranges]),
    "permute": lambda x, *order: x.permute(order),
    "reshape": lambda x, *shape: x.reshape(shape),
    "select": lambda x, dim, index: x.select(dim, index),
    "cast": lambda x, dtype: x.to(getattr(torch, dtype)),
    "scale": _wide(lambda x, factor: x * factor),
    "shift": _wide(lambda x, number: x + number),
    "scale_rows": _wide(lambda x, v: x * v.reshape(-1, *[1] * (x.ndim - 1))),
    "scale_columns": _wide(lambda x, v: x * v),
    "rsqrt": _wide(lambda x, eps: 1 / (x + eps).sqrt()),
    "centred": _wide(lambda x, dim: x - x.mean(dim, keepdim=True)),
    "add": _wide(lambda a, b: a + b),
    "matmul": _wide(lambda a, b: a @ b),
}
