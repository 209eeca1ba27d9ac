"""Recognise: every rule tried at every value it may end with, overlaps resolved, and what nearly matched told of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from torch import fx

from recast.patterns.constants import Constants
from recast.patterns.language import Match, Reason, Scope, Trail, among, in_words, match_at
from recast.patterns.linear.find import find_linear
from recast.patterns.memo import remembered
from recast.patterns.program import Program
from recast.patterns.rules import Rule, Surroundings, miss, rules
from recast.patterns.sites import Mismatch, Site

__all__ = ["Recognition", "recognise"]

_WHOLE = (
    10_000  # a match that `build` refused came farther than any that did not match; of equal ones the last rule is told
)

Failure = tuple[float, Rule, Reason, fx.Node]  # how deep it came, with which rule, why it ended, and where


@dataclasses.dataclass(frozen=True)
class Recognition:
    """Sites of all kinds, linear ones first, and every near miss."""

    sites: tuple[Site, ...]
    misses: tuple[Mismatch, ...]


def recognise(
    program: Program, constants: Constants | None = None, *, only: Sequence[Rule] | None = None
) -> Recognition:
    """Find linear sites, then what they are part of.

    A value belongs to at most one match of a kind. Rules of a kind are tried in their order, each at every value from the last
    to the first, and the first match that a value is part of keeps it: so the longer spelling is written before the shorter.

    Parameters
    ----------
    program
        Where to look.
    constants
        Of the program, if they are known.
    only
        Rules to try; by default all there are.
    """
    if only is not None:
        return _recognise(program, constants or Constants(program), sorted(only, key=lambda rule: rule.order))
    tried = rules()
    # By identity: hashing a rule goes through all of its patterns, again and again where they share some, which took longer
    # than recognising a small model. The rules are kept with the answer, so that no other can take their place in memory.
    question = ("structures", *map(id, tried))
    _, found = remembered(
        program, question, lambda: (tried, _recognise(program, constants or Constants(program), tried))
    )
    return found


def _recognise(program: Program, constants: Constants, tried: Sequence[Rule]) -> Recognition:
    scope = Scope(program, constants)
    linear, misses = find_linear(program, constants)
    around = Surroundings(scope, linear)
    by_target: dict[object, list[fx.Node]] = {}
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and node not in constants]
    for node in nodes:
        by_target.setdefault(node.target, []).append(node)
    position = {node: i for i, node in enumerate(nodes)}
    for kind in dict.fromkeys(rule.kind for rule in tried):
        misses += _kind([rule for rule in tried if rule.kind == kind], around, by_target, position)
    return Recognition((*linear, *around.sites), tuple(misses))


def _kind(
    tried: Sequence[Rule],
    around: Surroundings,
    by_target: dict[object, list[fx.Node]],
    position: dict[fx.Node, int],
) -> list[Mismatch]:
    owner: dict[fx.Node, Match] = {}
    failed: dict[fx.Node, Failure] = {}
    found: list[tuple[int, Site]] = []
    # What rules without anchors refused: they have no other place to tell it.
    refused: dict[fx.Node, tuple[Rule, str]] = {}
    for rule in tried:
        targets = rule.pattern.targets()
        roots = position if targets is None else [n for t in targets for n in by_target.get(t, ())]
        for root in sorted(roots, key=position.__getitem__, reverse=True):
            if root in owner:
                continue
            trail = Trail()
            match = match_at(rule.pattern, root, around.scope, trail)
            if isinstance(match, Match):
                taken = [n for n in match.nodes if n in owner]
                site = rule.made(match, around) if not taken else f"'{taken[0].name}' is part of another match"
                if not isinstance(site, str):
                    owner.update(dict.fromkeys((*match.nodes, *getattr(site, "nodes", ())), match))
                    found.append((position[root], site))
                    continue
                _note(failed, match.nodes, rule, (_WHOLE + len(match.nodes), rule, site, root))
                if not rule.anchors and not taken and rule.suspects(root, around):
                    refused[root] = (rule, site)
            elif trail.node is not None:
                _note(failed, trail.seen, rule, (trail.depth, rule, trail.words, trail.node))
                for node, (depth, reason) in trail.failures.items():
                    if among(node, rule.anchors):
                        _note(failed, (node,), rule, (depth, rule, reason, node))
    around.add(_named_apart([site for _, site in sorted(found, key=lambda item: item[0])], around))
    misses = []
    told: set[tuple[str, str, fx.Node]] = set()
    anchored_at = {t: [rule for rule in tried if t in rule.anchors] for t in by_target}
    suspects = [(node, rules_) for t, rules_ in anchored_at.items() if rules_ for node in by_target[t]]
    for node, anchored in sorted(suspects, key=lambda item: position[item[0]]):
        if node in owner or not any(rule.suspects(node, around) for rule in anchored):
            continue
        if node in failed:
            _, rule, why, reached = failed[node]
            reason = in_words(why)
            if (rule.name, reason, reached) in told:  # several anchors in one place
                continue
            told.add((rule.name, reason, reached))
            misses.append(miss(rule.kind, node, f"nearest pattern '{rule.name}': {reason}", reached=reached))
        else:
            names = " or ".join(rule.name for rule in anchored)
            misses.append(
                miss(anchored[0].kind, node, f"no pattern ({names}) leads here: its result is used otherwise")
            )
    for node, (rule, reason) in refused.items():
        if node not in owner:
            misses.append(miss(rule.kind, node, f"nearest pattern '{rule.name}': {reason}"))
    return misses


def _named_apart(sites: Sequence[Site], around: Surroundings) -> list[Site]:
    """The same sites with names of their own: a module called twice gives several."""
    taken = {*around.linear, *(site.name for site in around.sites)}
    tried: dict[str, int] = {}  # so that a name that a thousand calls have is not counted up from one each time
    apart = []
    for site in sites:
        numbers = itertools.count(tried.get(site.name, 0))
        number, name = next((i, n) for i in numbers if (n := f"{site.name}_{i}" if i else site.name) not in taken)
        taken.add(name)
        tried[site.name] = number + 1
        apart.append(site if name == site.name else dataclasses.replace(site, name=name))
    return apart


def _note(
    failed: dict[fx.Node, Failure],
    nodes: Sequence[fx.Node],
    rule: Rule,
    failure: Failure,
) -> None:
    for node in nodes:
        if among(node, rule.anchors) and (node not in failed or failed[node][0] <= failure[0]):
            failed[node] = failure
