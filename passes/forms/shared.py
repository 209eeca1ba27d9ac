"""What forms share that are fitted to several matrices at once and hold a part of them in common."""
# ruff: noqa: D102  # methods are described by the base class

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from recast.passes.forms.form import Form, Together, data_error
from recast.passes.forms.operator import Operator, common_tensors
from recast.passes.forms.stats import Stats
from recast.patterns.errors import FormError, PlanError, nearest

__all__ = ["SharedForm", "divided", "groups_of", "needs_drift", "pooled"]

ACROSS = ("layers", "drift", "all")


@dataclass(frozen=True)
class SharedForm(Together):
    """A form of a group of matrices of one shape. Of a single matrix it is the form of a group of one.

    Which matrices make a group is read from the names of their sites, and across drift from what was measured, by `groups_of`.
    """

    group: int = field(default=0, kw_only=True, metadata={"help": "matrices in a group; 0: all of them"})
    across: str = field(
        default="layers",
        kw_only=True,
        metadata={
            "help": "'layers': names that differ in their last number; 'drift': layers, cut where their output "
            "distributions differ most, groups of that size on average; 'all': any of one shape"
        },
    )

    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group < 0:
            raise FormError(
                f"{self.name}: group is {self.group}, negative; 2 would share between two layers, 0 among all"
            )
        if self.across not in ACROSS:
            raise FormError(f"{self.name}: across is {self.across!r}; {nearest(self.across, ACROSS)}")

    def idle(self, count: int) -> str | None:
        """Say why a group of so many matrices gains nothing by sharing, and what would; None where it may."""
        return None

    def fit_together(
        self, weights: Sequence[Tensor], stats: Sequence[Stats | None], *, where: Sequence[str] | None = None
    ) -> list[Operator]:
        checked = self.checked_together(weights, stats, where)
        shapes = {tuple(weight.shape) for weight in checked}
        if len(shapes) != 1:
            raise FormError(f"{self}: matrices of one shape are needed, these are {sorted(shapes)}; share them apart")
        found = self.solve_together(checked, stats)
        if all(known is None or known.gram is None for known in stats):
            return found
        free = self.solve_together(checked, [None] * len(checked))

        def total(operators: list[Operator]) -> float:
            return sum(data_error(w, o, s) for w, o, s in zip(checked, operators, stats, strict=True))

        return min((found, free), key=total)


def pooled(stats: Sequence[Stats | None]) -> Stats | None:
    """Statistics of the inputs of several matrices taken together; None unless all of them are known."""
    total: Tensor | None = None
    tokens = 0
    for known in stats:
        if known is None or known.gram is None:
            return None
        total = known.gram if total is None else total + known.gram
        tokens += known.tokens
    return None if total is None else Stats.from_gram(total, tokens)


def divided(operators: Sequence[Operator]) -> list[int]:
    """Bytes of each operator of a group; those of a tensor that several hold count for each in equal parts, rounded up."""
    holders = Counter(tensor.untyped_storage()._cdata for operator in operators for tensor in _distinct(operator))
    if all(count == 1 for count in holders.values()):
        return [operator.nbytes for operator in operators]
    return [
        sum(-(-t.numel() * t.element_size() // holders[t.untyped_storage()._cdata]) for t in _distinct(operator))
        for operator in operators
    ]


def _distinct(operator: Operator) -> list[Tensor]:
    tensors = operator.tensors()
    common = common_tensors(tensors)
    return [tensor for name, tensor in tensors.items() if name not in common]


def groups_of(
    forms: Mapping[str, Form], shapes: Mapping[str, tuple[int, int]], drift: Mapping[str, float] | None = None
) -> list[list[str]]:
    """Which sites share, given the form and the shape of each; sites whose form shares nothing are left out.

    A group is a run of `group` sites, in the order of the numbers in their names, of one form and one shape whose names
    differ in their last number only: layers, or the experts of one layer. ``across='drift'`` takes names that differ in the
    number of their layer only and makes as many groups as runs of `group` would be (one for 0), cut where `drift` is largest,
    at the earlier of equal ones; sites in no measured layer stay alone.

    Parameters
    ----------
    forms, shapes
        By name of site.
    drift
        Of layers, as `recast.calibrate` measures it.

    Raises
    ------
    PlanError
        A form groups by drift, and there is none.

    Examples
    --------
    >>> form = Form.parse("shared_basis(4, group=2)")
    >>> names = [f"layers.{i}.{kind}" for kind in ("key", "query") for i in range(3)]
    >>> for group in groups_of(dict.fromkeys(names, form), dict.fromkeys(names, (8, 8))):
    ...     print(group)
    ['layers.0.key', 'layers.1.key']
    ['layers.2.key']
    ['layers.0.query', 'layers.1.query']
    ['layers.2.query']
    >>> form = Form.parse("shared_basis(4, group=2, across='drift')")
    >>> groups_of(dict.fromkeys(names[:3], form), dict.fromkeys(names, (8, 8)), {"layers.0": 0.7, "layers.1": 0.1})
    [['layers.0.key'], ['layers.1.key', 'layers.2.key']]
    """
    alike: dict[tuple[str, Form, tuple[int, int]], list[str]] = defaultdict(list)
    for name, form in forms.items():
        shared = form.shared_part
        if isinstance(shared, SharedForm):
            alike[_kind(name, form, shared, drift), form, shapes[name]].append(name)
    found = []
    for (_, form, _), names in alike.items():
        shared = form.shared_part
        assert isinstance(shared, SharedForm)
        ordered = sorted(names, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
        size = shared.group or len(ordered)
        if shared.across == "drift":
            found += _cut_by_drift(ordered, size, drift or {})
            continue
        found += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return found


def needs_drift(forms: Iterable[Form | None]) -> bool:
    """Whether one of some forms groups layers by their drift."""
    parts = [form.shared_part for form in forms if form is not None]
    return any(isinstance(part, SharedForm) and part.across == "drift" for part in parts)


def _kind(name: str, form: Form, shared: SharedForm, drift: Mapping[str, float] | None) -> str:
    """What the names of sites that may share have in common."""
    if shared.across == "all":
        return ""
    if shared.across == "layers":
        return re.sub(r"\d+(?=\D*$)", "*", name)
    if not drift:
        found = "there is no calibration" if drift is None else "this calibration was made without"
        raise PlanError(
            f"plan: '{form}' groups layers by the drift of their output distributions, and {found}; "
            "recast.calibrate(program, batches, drift=True) measures it, `recast optimize --calibrate` does so where it is "
            "given inputs; across='layers' needs none"
        )
    found_at = _layer_of(name, drift)
    return name if found_at is None else f"{found_at[0]}*{found_at[2]}"


def _layer_of(name: str, drift: Mapping[str, float]) -> tuple[str, int, str] | None:
    """What stands before the number of a site's layer, the number, and what follows."""
    for prefix in dict.fromkeys(re.sub(r"\d+$", "", layer) for layer in drift):
        if name.startswith(prefix) and (number := re.match(r"\d+(?=\.|$)", name[len(prefix) :])):
            return prefix, int(number[0]), name[len(prefix) + number.end() :]
    return None


def _cut_by_drift(names: list[str], size: int, drift: Mapping[str, float]) -> list[list[str]]:
    """As many runs as runs of `size` would be, cut where layers differ most; layers left out between two count as well."""
    places = [_layer_of(name, drift) for name in names]
    known = {at[:2]: value for layer, value in drift.items() if (at := _layer_of(layer, drift)) is not None}
    gaps = [
        sum(value for (prefix, number), value in known.items() if prefix == a[0] and a[1] <= number < b[1])
        for a, b in pairwise(places)
        if a is not None and b is not None
    ]
    cuts = sorted(range(1, len(names)), key=lambda i: (-gaps[i - 1], i))[: math.ceil(len(names) / size) - 1]
    return [names[i:j] for i, j in pairwise([0, *sorted(cuts), len(names)])]
