"""Rules: a named pattern, what a match of it means, and where a near miss is worth telling of. Rules are found, not listed.

A folder under ``patterns/`` whose ``__init__`` names ``RULES`` takes part; so does whatever another package offers under the
entry point group ``recast_patterns`` (a rule, or several). Nothing here has to be changed to add one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from recast.patterns.errors import RecastError
from recast.patterns.language import Match, Pattern, Scope
from recast.patterns.plugins import offered
from recast.patterns.sites import LinearSite, Mismatch, Site, Use, source_line

__all__ = ["Rule", "Surroundings", "never", "rules"]

GROUP = "recast_patterns"


class Surroundings:
    """What `build` may look at besides the match: the program, its linear sites, and the sites of rules that came before.

    Attributes
    ----------
    scope
        The program, with its constants.
    linear
        Linear sites by name.
    sites
        Sites recognised so far, other than linear ones.
    structures
        The same by the value they give.
    names
        Names taken, by kind.
    position
        Of every value in the graph.
    """

    def __init__(self, scope: Scope, linear: Iterable[LinearSite]) -> None:
        self.scope = scope
        self.linear = {site.name: site for site in linear}
        self.sites: list[Site] = []
        self.structures: dict[fx.Node, list[Site]] = {}
        self.names: dict[str, set[str]] = {}
        self._by_weight: dict[str, list[LinearSite]] = {}
        self._products: dict[fx.Node, list[tuple[LinearSite, Use]]] = {}
        for site in self.linear.values():
            for weight in site.weights:
                self._by_weight.setdefault(weight, []).append(site)
            for use in site.uses:
                for node in {use.node, use.product}:
                    self._products.setdefault(node, []).append((site, use))
        self.position = {node: i for i, node in enumerate(scope.program.graph.nodes)}
        self._parts: dict[str, dict[fx.Node, Site]] = {}
        self._seen = 0

    def add(self, sites: Iterable[Site]) -> None:
        """Take in sites that a kind of rules found."""
        for site in sites:
            self.sites.append(site)
            self.names.setdefault(site.kind, set()).add(site.name)
            node = getattr(site, "node", None)
            if node is not None:
                self.structures.setdefault(node, []).append(site)

    def reading(self, weights: Iterable[str]) -> list[LinearSite]:
        """Linear sites that read any of some weights."""
        found = {site.name: site for weight in weights for site in self._by_weight.get(weight, ())}
        return list(found.values())

    def products(self, node: fx.Node) -> list[tuple[LinearSite, Use]]:
        """Linear sites of which a value is the product (several for a batched weight); empty if it is none."""
        return self._products.get(node, [])

    def part_of(self, kind: str, node: fx.Node) -> Site | None:
        """The site of a kind that a value is part of, of those recognised so far."""
        for site in self.sites[self._seen :]:
            self._parts.setdefault(site.kind, {}).update(dict.fromkeys(getattr(site, "nodes", ()), site))
        self._seen = len(self.sites)
        return self._parts.get(kind, {}).get(node)


def never(node: fx.Node, around: Surroundings) -> bool:
    """Told of nowhere: what a rule refuses is for the others of its kind to tell."""
    return False


Build = Callable[[Match, Surroundings], "Site | str"]
Emit = Callable[[Any], "tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing to recognise.

    Parameters
    ----------
    name
        Of the pattern; shown in near misses.
    kind
        Of the sites it gives: ``norm``, ``rotary``, ``attention``, ``moe``, ``mlp`` or one of your own.
    pattern
        Matched at every value that its last operation may be.
    build
        Makes the site of a match, or says in a sentence why it is none.
    anchors
        Operations that suggest that the thing is there: one that no match of this kind took in becomes a near miss.
    suspicious
        Whether an anchor outside a match is worth telling of; without anchors, whether what `build` refused is.
    order
        Kinds are recognised in this order; within a kind the rule with the larger order is tried later.
    emit
        The operation of the dialect that a site stands for: a plain function of tensors (its body is its meaning), and its
        operands, graph values among them. None for sites that name places and compute nothing of their own.
    """

    name: str
    kind: str
    pattern: Pattern
    build: Build
    anchors: frozenset[Any] = frozenset()
    suspicious: Callable[[fx.Node, Surroundings], bool] = lambda node, around: True
    order: int = 0
    emit: Emit | None = None

    def __post_init__(self) -> None:
        for field, fits, wanted in (
            ("pattern", isinstance(self.pattern, Pattern), "a pattern of recast.patterns.language"),
            ("build", callable(self.build), "a function of a match and its surroundings"),
            (
                "anchors",
                isinstance(self.anchors, frozenset),
                "a frozenset of operations, e.g. frozenset({aten.relu.default}),",
            ),
            ("suspicious", callable(self.suspicious), "a function of a node and its surroundings"),
        ):
            if not fits:
                raise RecastError(f"rule '{self.name}': {field} is {getattr(self, field)!r}; {wanted} is needed")

    def made(self, match: Match, around: Surroundings) -> Site | str:
        """What `build` makes of a match; RecastError names the rule if it is another package's and fails."""
        site = self._asked(lambda: self.build(match, around), "build")
        if not isinstance(site, Site | str):
            raise RecastError(
                f"rule '{self.name}' ({self.build.__module__}): build gives {site!r}; a Site is needed, or a sentence that says "
                "why there is none"
            )
        return site

    def suspects(self, node: fx.Node, around: Surroundings) -> bool:
        """Whether a value that is no part of a match is worth telling of; errors as in `made`."""
        return bool(self._asked(lambda: self.suspicious(node, around), "suspicious"))

    def _asked(self, question: Callable[[], Any], what: str) -> Any:
        try:
            return question()
        except Exception as error:
            where = getattr(self, what).__module__
            if isinstance(error, RecastError) or where.partition(".")[0] == "recast":
                raise  # a defect of ours is told as one
            raise RecastError(
                f"rule '{self.name}' ({where}): {what} raised {type(error).__name__}: {error}; repair or uninstall that package"
            ) from error


def miss(kind: str, node: fx.Node, reason: str, *, reached: fx.Node | None = None, name: str = "") -> Mismatch:
    """Say that a place is no site of a kind, and why; `reached` is the value where matching ended."""
    ended = reached if reached is not None else node
    return Mismatch(name or node.name, kind, 0, reason, ended.name, source_line(ended) or source_line(node))


@functools.cache
def rules() -> tuple[Rule, ...]:
    """Every rule there is, in the order of trying.

    Raises
    ------
    RecastError
        Something offered under the entry point group is no rule.
    """
    found: list[Rule] = []
    package = importlib.import_module("recast.patterns")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            found += getattr(importlib.import_module(f"recast.patterns.{module.name}"), "RULES", ())
    for where, thing in offered(GROUP, "patterns"):
        for rule in list(thing) if isinstance(thing, Iterable) else [thing]:
            if not isinstance(rule, Rule):
                raise RecastError(f"patterns: {where} offers {rule!r}; a Rule or several are needed")
            found.append(rule)
    return tuple(sorted(found, key=lambda rule: rule.order))
