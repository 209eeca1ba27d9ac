"""What a place in a model is, the nearest pattern, and why it did not match."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from recast.passes.forms import forms
from recast.patterns.errors import FormError, ModelError
from recast.patterns.find import coverage
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite, Mismatch, Site, source_line

__all__ = ["explain"]


def explain(program: Program, name: str) -> dict[str, Any]:
    """Say what a place is.

    Parameters
    ----------
    program
        Where to look.
    name
        A site, a part of one, a weight, a module, or a value of the graph.

    Returns
    -------
    dict
        ``name``, ``what`` (``site``, ``part``, ``miss``, ``vector``, ``module``, ``value``), ``text`` in words, and more by kind.

    Raises
    ------
    ModelError
        There is no such place; the nearest names are given.
    """
    covered = coverage(program)
    sites = {site.name: site for site in covered.sites if isinstance(site, LinearSite)}
    wanted = program.aliases.get(name, name)
    site = sites.get(wanted) or next((s for s in sites.values() if wanted in s.weights), None)
    if site is not None:
        return _site(site)
    structures = [s for s in covered.sites if s.name == wanted and not isinstance(s, LinearSite)]
    if structures:
        return _structure(structures)
    owner, _, part = wanted.rpartition(".")
    if owner in sites and part in {p.name for p in sites[owner].parts}:
        return _part(sites[owner], part)
    misses = [m for m in covered.misses if wanted in (m.name, m.node, m.name.removesuffix(".weight"))]
    if misses:
        return _miss(wanted, misses)
    weights = program.weights
    if wanted in weights:
        shape = tuple(weights[wanted].shape)
        text = f"a {'vector' if len(shape) < 2 else 'tensor'} of shape {shape}, not a matrix that multiplies"
        return {"name": wanted, "what": "vector", "shape": list(shape), "text": text}
    inside = [s for s in sites if s.startswith(f"{wanted}.")]
    missed = [m for m in covered.misses if m.name.startswith(f"{wanted}.")]
    if inside or missed:
        text = f"a module with {len(inside)} sites and {len(missed)} places that did not match"
        found = [{"name": s, "shape": list(sites[s].shape)} for s in inside]
        return {"name": wanted, "what": "module", "text": text, "sites": found, "misses": [m.to_dict() for m in missed]}
    value = next((node for node in program.graph.nodes if node.name == wanted and node.op != "output"), None)
    if value is not None:
        return _value(value, covered.sites)
    known = [*sites, *weights, *(m.name for m in covered.misses)]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(repr(c) for c in close)}?"
        if close
        else f"there are {len(sites)} sites, such as {next(iter(sites), 'none')};"
    )
    raise ModelError(f"explain: there is no place '{name}' in {program.label}; {hint} `recast inspect` lists them all")


def _value(node: fx.Node, sites: tuple[Site, ...]) -> dict[str, Any]:
    """Any other value of the graph: what makes it, and what it is part of."""
    made = "an input" if node.op == "placeholder" else f"made by {getattr(node.target, '_opname', node.target)}"
    shape = getattr(node.meta.get("val"), "shape", None)
    text = f"a value of the graph, {made}" + (f", of shape {tuple(map(str, shape))}" if shape is not None else "")
    parts = [site for site in sites if node in getattr(site, "nodes", ()) or node is getattr(site, "node", None)]
    uses = [s for s in sites if isinstance(s, LinearSite) and any(node in (u.node, u.product) for u in s.uses)]
    owners = [f"{site.kind} {site.name}" for site in (*uses, *parts)]
    text += f"; part of {', '.join(dict.fromkeys(owners))}" if owners else "; part of no site"
    return {"name": node.name, "what": "value", "text": text, "part_of": owners, "where": source_line(node)}


def _site(site: LinearSite) -> dict[str, Any]:
    text = f"matches the pattern 'linear': a {site.out_features}×{site.in_features} matrix, written as {site.spelling}"
    if len(site.uses) > 1:
        text += f", used {len(site.uses)} times"
    if site.parts:
        text += f"; packed: {', '.join(f'{p.name} ({p.size} rows)' for p in site.parts)}"
    if site.tied:
        text += f"; tied: {', '.join(site.tied)} reads the same weight, so a rule must name it to rewrite it"
    return {**site.to_dict(), "what": "site", "text": text, "forms": _forms(site.shape, site.dtype)}


def _structure(found: Sequence[Site]) -> dict[str, Any]:
    first = found[0].to_dict()
    text = "; ".join(f"{s.kind} '{s.name}', found by the pattern '{getattr(s, 'pattern', s.kind)}'" for s in found)
    details = ", ".join(
        f"{k} {v}" for k, v in first.items() if k not in ("kind", "name", "weights", "pattern", "where")
    )
    return {**first, "what": "site", "text": f"{text}: {details}" if details else text}


def _part(site: LinearSite, name: str) -> dict[str, Any]:
    part = next(p for p in site.parts if p.name == name)
    shape = (part.size, site.in_features)
    text = f"part '{name}' of the packed matrix {site.name}: {part.size} of its {site.out_features} rows"
    found = {"name": f"{site.name}.{name}", "what": "part", "kind": site.kind, "shape": list(shape), "text": text}
    return {**found, "site": site.name, "where": site.where, "forms": _forms(shape, site.dtype)}


def _miss(name: str, misses: list[Mismatch]) -> dict[str, Any]:
    first = misses[0]
    nearest = "linear" if first.kind in ("product", "convolution", "other") else "none"
    text = f"not a site ({first.kind}): {first.reason}"
    if nearest != "none":
        text = f"nearest pattern 'linear'; did not match: {first.reason}"
    return {"name": name, "what": "miss", "nearest": nearest, "text": text, "misses": [m.to_dict() for m in misses]}


def _forms(shape: tuple[int, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """A few forms of every kind: bytes they would take, or why they do not go with the shape."""
    found = []
    for kind in forms().values():
        for form in kind.examples((64, 64))[:2] or []:
            row: dict[str, Any] = {"form": str(form)}
            try:
                form.check(shape)
                outline = form.outline(shape, dtype)
                row["bytes"] = outline.nbytes if outline is not None else None
            except FormError as error:
                row["problem"] = str(error)
            found.append(row)
    return found
