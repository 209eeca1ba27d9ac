"""ARMOR: a 2:4 core between two block-diagonal matrices."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recast.passes.forms.algebra import DirectSum, Product
from recast.passes.forms.armor_adam import AdamSearch
from recast.passes.forms.armor_alternating import AlternatingSearch
from recast.passes.forms.armor_fit import ArmorFactors, ArmorSearch
from recast.passes.forms.block_diagonal import BlockDiagonal
from recast.passes.forms.form import NamedForm
from recast.passes.forms.linear_algebra import pseudo_inverse
from recast.passes.forms.nm_sparse import outline_nm, pack_nm
from recast.passes.forms.operator import Operator, Refit
from recast.passes.forms.pruning import input_energy, normalised, top_of_groups, wide
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError

__all__ = ["Armor", "ArmorForm"]

# Share of the mean added to the Gram matrix where the outer factor is solved for, against data of few tokens.
_DAMPING = 0.01
# Searches by name, and their steps where none are asked for.
_SEARCHES: dict[str, tuple[type[ArmorSearch], int]] = {
    "alternating": (AlternatingSearch, 200),
    "adam": (AdamSearch, 20000),
}


@dataclass(frozen=True, eq=False, repr=False)
class Armor(Product):
    """``A (C B)``, of which ``|`` refits the core C alone: the blocks around it are few."""

    kind: ClassVar[str] = "armor"

    def to(self, dtype: torch.dtype) -> Armor:
        return Armor(self.left.to(dtype), self.right.to(dtype))

    def refit(self, fit: Refit, stats: Stats | None = None, path: str = "") -> Operator:
        inner = self.right
        if not isinstance(inner, Product):  # as no fit makes it
            return self
        seen = None if stats is None else stats.through(inner.right)
        core = inner.left.refit(fit, seen, f"{path}.right.left" if path else "right.left")
        return Armor(self.left, Product(core, inner.right))


@dataclass(frozen=True)
class ArmorForm(NamedForm):
    """``W' = A C B``: C (m, n) with two of every four inputs kept, A (m, m) and B (n, n) of dense blocks on a diagonal.

    W is first divided by the norms of its columns and rows, which A and B take back at the end. From identities around
    the core of NoWag-P ``Σ (W̄ - A C B)²_ij ‖X_j‖²`` is lowered, by one of two searches:

    - ``alternating``: rounds of exact steps. A, then B, solve their least squares; in each row of every tile a group takes
      the best of its six supports; conjugate gradients improve what is kept. No step raises the loss. On a random weight
      of 4096 x 4096 thirty rounds, a minute and a half on two cores, reach what the other does not in ten minutes.
    - ``adam``: the paper's. Each step sets one pair in every tile to the exact least-squares optimum over its six
      supports, then takes one step of Adam on A, B and C. The best factors seen are kept.

    Either ends early where steps bring nothing, and is never above NoWag-P's loss. The same seed gives the same result.

    Storage: 9/16 of the dense 16-bit weight and ``(m + n) block`` values; the last block of a side that does not divide
    is smaller. With ``polish=true`` A is at last solved for anew under the whole Gram matrix, a step that is not in the
    paper and lowers the error further; the loss above sees each input for itself only.

    The paper's 20,000 steps take hours for a large weight on a CPU. With data, the fit without is made as well and the
    better of the two is kept, as for every form: twice the time. In a plan, what a search has reached is kept beside the
    fitted operators once a minute, and an interrupted one goes on there, to the same result.

    Notes
    -----
    ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization (2025).

    Examples
    --------
    >>> weight = torch.randn(64, 64, dtype=torch.bfloat16)
    >>> operator = ArmorForm(block=8).fit(weight)
    >>> operator.nbytes == 64 * 64 * 2 * 9 // 16 + (64 + 64) * 8 * 2
    True
    """

    name: ClassVar[str] = "armor"
    summary: ClassVar[str] = "a 2:4 core between two block-diagonal matrices, fitted together"

    block: int = field(default=128, metadata={"help": "size of the blocks of A and B, a multiple of 4"})
    iterations: int | None = field(
        default=None, metadata={"help": "rounds or steps at most: 200 of 'alternating', 20000 of 'adam' if not given"}
    )
    rate: float = field(default=1e-4, metadata={"help": "step size of 'adam'"})
    greedy: bool = field(
        default=False,
        metadata={"help": "take the pairs of the largest slopes, instead of drawing them by their slopes"},
    )
    seed: int = field(default=0, metadata={"help": "of what is drawn"})
    polish: bool = field(default=True, metadata={"help": "solve for A under the whole Gram matrix in the end"})
    search: str = field(default="alternating", metadata={"help": "'alternating', or 'adam' as in the paper"})

    def __post_init__(self) -> None:
        if self.block < 4 or self.block % 4:
            raise FormError(f"armor: block is {self.block}, not a positive multiple of 4; 128 would work")
        if self.iterations is not None and self.iterations < 0:
            raise FormError(f"armor: iterations is {self.iterations}, negative; 200 would work")
        if self.search not in _SEARCHES:
            raise FormError(f"armor: search is {self.search!r}; {' or '.join(map(repr, _SEARCHES))} would work")
        if not 0 < self.rate < float("inf"):
            raise FormError(f"armor: rate is {self.rate}, not positive; 1e-4 would work")

    @classmethod
    def examples(cls, shape: tuple[int, int]) -> list[NamedForm]:
        return [cls(block=8, iterations=6)]

    @property
    def fixed_point(self) -> bool:
        return False  # a search is no projection

    def size(self, shape: tuple[int, int]) -> int:
        """Return the size of the blocks for a weight (m, n): `block`, or less where one block covers both sides."""
        return min(self.block, -(-max(shape) // 4) * 4)

    def outline(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Armor:
        m, n = shape
        d = self.size(shape)
        outer, inner = (torch.empty(-(-side // d), d, d, dtype=dtype, device="meta") for side in (m, n))
        return Armor(_blocks(outer, m), Product(outline_nm(shape, dtype, 2, 4), _blocks(inner, n)))

    def begun(self, weight: Tensor, stats: Stats | None) -> tuple[ArmorSearch, Tensor, Tensor]:
        """Set up the search for a weight (m, n).

        Returns
        -------
        The search, not begun, and the norms that rows (m,) and columns (n,) of the weight were divided by.
        """
        m, n = weight.shape
        d = self.size((m, n))
        extra = (0, -n % d, 0, -m % d)
        target, rows, columns = normalised(wide(weight))
        energy = input_energy(weight, stats).to(target.dtype)
        # Rows and columns past the weight's own are zero, and stay so: no slope leads away from there.
        mask = top_of_groups(torch.nn.functional.pad(target.square() * energy, extra, value=-1), 2, 4)
        target = torch.nn.functional.pad(target, extra)
        eye = torch.eye(d, dtype=target.dtype, device=target.device)
        begin = ArmorFactors(
            eye.repeat(target.shape[0] // d, 1, 1),
            torch.where(mask, target, 0),
            mask.clone(),
            eye.repeat(target.shape[1] // d, 1, 1),
        )
        weights = torch.nn.functional.pad(energy, (0, -n % d))
        kind, _ = _SEARCHES[self.search]
        search = kind(target, weights, begin, n, rate=self.rate, greedy=self.greedy, seed=self.seed)
        return search, rows, columns

    def solve(self, weight: Tensor, stats: Stats | None) -> Armor:
        m, n = weight.shape
        d = self.size((m, n))
        search, rows, columns = self.begun(weight, stats)
        found = search.run(_SEARCHES[self.search][1] if self.iterations is None else self.iterations)
        del search  # and what it held
        left = found.left * _filled(rows, d).reshape(-1, d, 1)
        right = found.right * _filled(columns, d).reshape(-1, 1, d)
        core, kept = found.core[:m, :n], found.mask[:m, :n].clone()
        if 0 < n % 4 <= 2:
            kept[:, n - n % 4 :] = True  # a group so short keeps all it has
        if self.polish:
            left = _polished(weight, left, core, right, stats)
        dtype = weight.dtype
        packed = pack_nm(core.to(dtype), kept, 2, 4)
        return Armor(_blocks(left.to(dtype), m), Product(packed, _blocks(right.to(dtype), n)))


def _filled(norms: Tensor, d: int) -> Tensor:
    return torch.nn.functional.pad(norms, (0, -len(norms) % d), value=1)


def _blocks(blocks: Tensor, side: int) -> Operator:
    """Make the block-diagonal factor of a side, its last block cut off where the side ends."""
    d = blocks.shape[-1]
    whole, rest = divmod(side, d)
    parts: list[Operator] = []
    if whole:
        parts.append(BlockDiagonal(blocks[:whole].contiguous()))
    if rest:
        parts.append(BlockDiagonal(blocks[whole:, :rest, :rest].contiguous()))
    return parts[0] if len(parts) == 1 else DirectSum(tuple(parts))


def _polished(weight: Tensor, left: Tensor, core: Tensor, right: Tensor, stats: Stats | None) -> Tensor:
    """Solve for each block of A: ``min ‖(W_i - A_i C_i B) X‖`` with the Gram matrix damped; kept where it helps."""
    m, n = weight.shape
    d = left.shape[-1]
    blocks = right.double()
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device, torch.float64)
    ridge = 0.0 if gram is None else _DAMPING * float(gram.diagonal().mean())
    found = left.clone()
    for i, start in enumerate(range(0, m, d)):
        own = slice(start, min(start + d, m))
        size = own.stop - start
        rows = weight[own].double()
        # C_i B by the blocks of B, of which the last may reach past the inputs.
        filled = torch.nn.functional.pad(core[own].double(), (0, -n % d)).unflatten(1, (-1, d)).transpose(0, 1)  # type: ignore[no-untyped-call]
        inner = (filled @ blocks).transpose(0, 1).flatten(1)[:, :n]
        seen = inner if gram is None else inner @ gram
        square, mixed = seen @ inner.T, rows @ seen.T
        plain, across = inner @ inner.T, rows @ inner.T
        solved = (mixed + ridge * across) @ pseudo_inverse(square + ridge * plain)
        before = left[i, :size, :size].double()

        def error(a: Tensor, square: Tensor = square, mixed: Tensor = mixed) -> float:
            return float(((a @ square - 2 * mixed) * a).sum())

        if error(solved) < error(before):
            found[i, :size, :size] = solved.to(found.dtype)
    return found
