"""How many bytes a form takes, and the setting of it that a number of bytes allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from recast.passes.forms import Form
from recast.passes.forms.shared import groups_of
from recast.passes.forms.shared_atoms import SharedAtoms
from recast.passes.forms.shared_basis import SharedBasis
from recast.patterns.errors import FormError

HALF = torch.bfloat16
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """A form with one thing left open: how many bytes it takes.

    Parameters
    ----------
    name
        As rows and lines of the picture are called.
    kind
        ``low rank``, ``structured``, ``sparse``, ``quantized`` or ``activations``.
    settings
        Every setting as text, in any order; one for a form of fixed size.
    budgets
        Shares of the bytes at 16 bits, or the text of a form whose bytes are the budget; empty for a form of fixed size.
    data
        Whether the fit sees the calibration data.
    scope
        ``all``, ``attention``, ``mlp``, ``values`` or ``experts``: which matrices are rewritten; shares are of their bytes.
    block
        Kind of block of a form of whole blocks, else empty.
    ordered
        Whether each matrix is fitted to what reaches it once those before it are rewritten.
    """

    name: str
    kind: str
    settings: tuple[str, ...]
    budgets: tuple[float | str, ...] = BUDGETS
    data: bool = True
    scope: str = "all"
    block: str = ""
    ordered: bool = False


def planned_bytes(form: Form, shapes: Shapes) -> int | None:
    """Bytes of matrices of these shapes in a form, values in 16 bits; None where only the weights' values decide.

    Raises
    ------
    FormError
        One of the shapes cannot take the form.
    """
    shared = form.shared_part
    if isinstance(shared, SharedBasis | SharedAtoms):
        return _shared_bytes(form, shared, shapes)
    total, known = 0, dict[tuple[int, int], int]()
    for name, shape in shapes.items():
        if shape not in known:
            form.check(shape, name)
            outline = form.outline(shape, HALF)
            if outline is None:
                return None
            known[shape] = outline.nbytes
        total += known[shape]
    return total


def _shared_bytes(form: Form, shared: SharedBasis | SharedAtoms, shapes: Shapes) -> int | None:
    if form is not shared:
        return None
    total = 0
    for group in groups_of(dict.fromkeys(shapes, form), shapes):
        (m, n), count = shapes[group[0]], len(group)
        form.check((m, n), group[0])
        if isinstance(shared, SharedBasis):
            total += HALF.itemsize * min(shared.rank_for((m, n), count), n) * (n + count * m)
        else:
            atoms = min(shared.atoms, count)
            total += HALF.itemsize * (atoms * m * n + count * shared.rank * (m + n)) + 4 * atoms * count
    return total


def largest(settings: Iterable[str], shapes: Shapes, allowed: float) -> tuple[str, int] | None:
    """Find the setting of most bytes that are no more than allowed; None if even the smallest takes more.

    Settings that one of the shapes cannot take are left out; of several as large the first is taken.

    Examples
    --------
    >>> ranks = [f"low_rank({rank})" for rank in (1, 2, 4, 8)]
    >>> largest(ranks, {"a": (16, 16), "b": (16, 16)}, 600)
    ('low_rank(4)', 512)
    """
    return _best(_sizes(settings, shapes), allowed)


def _sizes(settings: Iterable[str], shapes: Shapes) -> list[tuple[str, int]]:
    found = []
    for text in settings:
        try:
            size = planned_bytes(Form.parse(text), shapes)
        except FormError:
            continue
        if size is not None:
            found.append((text, size))
    return found


def _best(sizes: Iterable[tuple[str, int]], allowed: float) -> tuple[str, int] | None:
    return max((pair for pair in sizes if pair[1] <= allowed), key=lambda pair: pair[1], default=None)


def allowance(budget: float | str, shapes: Shapes) -> float:
    """Bytes that a budget allows: a share of these matrices at 16 bits, or what they take in a named form."""
    if isinstance(budget, str):
        size = planned_bytes(Form.parse(budget), shapes)
        if size is None:
            raise FormError(f"fidelity: how many bytes '{budget}' takes is not known beforehand; it is no budget")
        return size
    return budget * HALF.itemsize * sum(m * n for m, n in shapes.values())


def choices(family: Family, shapes: Shapes) -> list[tuple[str, float | str | None]]:
    """Settings of a family for a model's matrices: text, and the budget it is for; those that no setting meets are left out."""
    if not family.budgets:
        return [(family.settings[0], None)]
    if family.block:
        return [(family.settings[0], budget) for budget in family.budgets]
    sizes = _sizes(family.settings, shapes)
    best = {budget: _best(sizes, allowance(budget, shapes)) for budget in family.budgets}
    return [(setting[0], budget) for budget, setting in best.items() if setting is not None]
