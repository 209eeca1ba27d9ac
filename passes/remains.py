"""What stays of a dense parameter when only some of the matrices in it are rewritten: a smaller stack of the others, or all of it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from recast.patterns.constants import Constants
from recast.patterns.sites import LinearSite, Use

__all__ = ["Kept", "Remains", "path_of", "remains_of", "runs_of"]

aten = torch.ops.aten

# What may stand between a stack and its product: it names no sizes, so it does the same to a smaller stack.
_SAME = {
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten._to_copy.default, aten.to.dtype,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Remains:
    """What products that are not rewritten still read of a parameter.

    Parameters
    ----------
    weight
        Name of the parameter.
    rewritten
        Names of the sites on it that are rewritten.
    numbers
        Its slices along the first dimension that are still read, in order; none if it goes.
    reason
        Why all of it stays; empty if it does not.
    tied
        Whether something else than a product reads it.
    picks
        Values that take one slice, or several neighbouring ones, for products that are not rewritten.
    """

    weight: str
    rewritten: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    reason: str = ""
    tied: bool = False
    picks: Mapping[fx.Node, range] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        names = ", ".join(self.rewritten[:3]) + (
            f" and {len(self.rewritten) - 3} more" if len(self.rewritten) > 3 else ""
        )
        return f"kept: the dense weight '{self.weight}' stays beside what is rewritten of it ({names}): {self.reason}"


def remains_of(sites: Iterable[LinearSite], planned: Container[str], constants: Constants) -> list[Remains]:
    """Say for every parameter that a planned site reads what else reads it, and whether that can be kept by itself.

    Parameters
    ----------
    sites
        All linear sites of the program.
    planned
        Names of those that are rewritten, as a whole or in part.
    constants
        Of the program.
    """
    on: dict[str, list[LinearSite]] = {}
    for site in sites:
        for name in site.weights:
            on.setdefault(name, []).append(site)
    found = []
    for name, own in on.items():
        rewritten = [site for site in own if site.name in planned]
        if rewritten:
            others = [site for site in own if site.name not in planned]
            found.append(_remains(name, rewritten, others, tuple(constants.weights[name].shape), constants))
    return found


def _remains(
    name: str, rewritten: list[LinearSite], others: list[LinearSite], shape: tuple[int, ...], constants: Constants
) -> Remains:
    names = tuple(site.name for site in rewritten)

    def whole(reason: str, tied: bool = False) -> Remains:
        return Remains(name, names, tuple(range(shape[0])), reason, tied)

    if tied := next((site.tied for site in (*rewritten, *others) if site.tied), ()):
        return whole(f"{', '.join(tied)} reads it", tied=True)
    gone: set[int] = set()
    for use in (use for site in rewritten for use in site.uses if others):
        numbers, _ = _read(use, shape, constants)
        gone |= set(range(shape[0])) if numbers is None else set(numbers)
    stays: set[int] = set()
    picks: dict[fx.Node, range] = {}
    for site in others:
        for use in site.uses:
            numbers, pick = _read(use, shape, constants)
            if numbers is None:
                return whole(f"'{site.name}' reads it as '{use.weight.name}', of which no part can be kept by itself")
            if gone & set(numbers):
                return whole(f"'{site.name}', which stays dense, reads the same elements")
            stays |= set(numbers)
            if pick is not None:
                picks[pick] = numbers
    return Remains(name, names, tuple(sorted(stays)), picks=picks)


def path_of(weight: fx.Node) -> list[fx.Node]:
    """What makes a constant of one parameter, the parameter first; empty if several enter."""
    path = [weight]
    while path[0].op != "get_attr":
        operands = path[0].all_input_nodes
        if len(operands) != 1:
            return []
        path.insert(0, operands[0])
    return path


def _read(use: Use, shape: tuple[int, ...], constants: Constants) -> tuple[range | None, fx.Node | None]:
    """Slices of its parameter that a use reads, None if that cannot be told; and the value that picks them, if one does."""
    path = path_of(use.weight)
    if not path:
        return None, None
    for node in path[1:]:
        if (numbers := _picked(node, path[0], shape)) is not None:
            return numbers, node
    number = use.index
    if number is None or not _numbered(use, path, shape, constants):
        return None, None
    return range(number, number + 1), None


def _picked(node: fx.Node, parameter: fx.Node, shape: tuple[int, ...]) -> range | None:
    """Slices that an operation takes of a parameter along the first dimension."""
    args: tuple[Any, ...] = node.args
    count = shape[0]
    source = args[0] if args else None
    if node.target is operator.getitem and isinstance(source, fx.Node) and source.target is aten.unbind.int:
        along: Any = source.args[1] if len(source.args) > 1 else 0
        if source.args[0] is not parameter or along % len(shape) != 0:
            return None
        return range(args[1] % count, args[1] % count + 1)
    if source is not parameter or node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    if len(args) > 1 and args[1] % len(shape) != 0:
        return None
    if node.target is aten.select.int:
        return range(args[2] % count, args[2] % count + 1)
    if len(args) < 5 or args[4] == 1:
        ends = [
            0 if len(args) < 3 or args[2] is None else args[2],
            count if len(args) < 4 or args[3] is None else args[3],
        ]
        start, stop = (max(0, min(end + count if end < 0 else end, count)) for end in ends)
        return range(start, stop) if (start, stop) != (0, count) else None
    return None


def _numbered(use: Use, path: list[fx.Node], shape: tuple[int, ...], constants: Constants) -> bool:
    """Whether the first dimension of a parameter numbers the matrices that a use multiplies with."""
    order = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    for node in path[1:]:
        if node.target in (aten.transpose.int, aten.permute.default):
            order = node.target(order, *node.args[1:])
        elif node.target not in _SAME:
            return False
    if tuple(order.shape[1:]) != tuple(constants.layout(use.weight).shape[1:]) or order.shape[0] != shape[0]:
        return False
    lead = order.flatten(1)
    if not bool((lead == torch.arange(shape[0]).unsqueeze(1)).all()):
        return False
    if use.routing is not None:
        return use.routing.count == shape[0] and tuple(use.weight_shape) == tuple(order.shape[1:])
    return use.contraction.batch == use.contraction.w[:1] and tuple(use.weight_shape) == tuple(order.shape)


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open runs of rising numbers.

    Examples
    --------
    >>> runs_of([0, 1, 4, 6, 7])
    [(0, 2), (4, 5), (6, 8)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


@dataclasses.dataclass(frozen=True)
class Kept:
    """Dense weights that stay beside what is rewritten of them.

    Parameters
    ----------
    nbytes
        For each planned name whose dense matrix stays, the bytes of it; together with the first part of a packed site, those
        of parts that are not rewritten, which its operator holds as well.
    notes
        A sentence for each such weight.
    """

    nbytes: Mapping[str, int]
    notes: list[str]

    @staticmethod
    def of(remains: Iterable[Remains], sites: Iterable[LinearSite], planned: Mapping[str, int]) -> Kept:
        """Count them.

        Parameters
        ----------
        remains
            As `remains_of` gives them.
        sites
            All linear sites.
        planned
            Bytes of the dense matrix of each name in the plan: sites, and parts of packed ones.
        """
        whole = [left for left in remains if left.reason]
        concerned = {name for left in whole for name in left.rewritten}
        found: dict[str, int] = {}
        tied = []
        for site in sites:
            if site.name not in concerned:
                continue
            own = [name for name in (site.name, *(f"{site.name}.{p.name}" for p in site.parts)) if name in planned]
            found |= {name: planned[name] for name in own}
            found[own[0]] += site.parameters * site.dtype.itemsize - sum(planned[name] for name in own)
            if site.tied:
                tied.append(
                    f"tied: {', '.join(site.tied)} still needs the dense weight of {site.name}, which is kept beside the "
                    "rewritten one"
                )
        return Kept(found, [*tied, *(str(left) for left in whole if not left.tied)])
