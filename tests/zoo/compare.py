"""Hold what was recognised to what is there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from recast.patterns.program import Program
from recast.patterns.recognise import Recognition

__all__ = ["compare", "gap", "module_path", "tensors"]

_KINDS = {"attention": "attention", "moe": "moe", "norms": "norm"}
_PLAIN = ("product", "convolution")  # every product of activations is one: told last


def compare(truth: Any, program: Program, found: Recognition) -> dict[str, Any]:
    """Count what was found of what is there.

    Matrices count by elements, those of a parameter that holds several as far as there are sites for them. An attention block counts if
    its site names linears for q, k, v and o; a mixture if every expert has its matrices named.
    """
    sites: dict[str, list[Any]] = {}
    for site in found.sites:
        sites.setdefault(site.kind, []).append(site)
    missed: dict[str, list[str]] = {}

    def canonical(name: str) -> str:
        return program.aliases.get(name, name)

    covered = _elements(sites.get("linear", []), canonical)
    elements = 0
    for matrix in truth.matrices.values():
        got = min(matrix.parameters, covered[canonical(matrix.name)])
        elements += got
        if got < matrix.parameters:
            missed.setdefault("matrices", []).append(matrix.name)
    there = _blocks(truth.attention, program)
    attention = _at_paths(there, [s for s in sites.get("attention", []) if s.q and s.k and s.v and s.o], missed)
    moe = _mixtures(truth.routed, sites.get("moe", []), canonical, missed)
    norms = _norms(truth.norms, sites.get("norm", []), canonical, missed)
    others = {kind: len(members) for kind, members in sites.items()}
    return {
        "matrices": [elements, truth.parameters],
        "attention": [attention, sum(there.values())],
        "moe": [moe, len(truth.routed)],
        "norms": [norms, len(truth.norms)],
        "sites": others,
        "misses": len(found.misses),
        "without_reason": len(_unexplained(missed, program, found)),
        "unexplained": _unexplained(missed, program, found)[:20],
        "missed": {kind: names[:40] for kind, names in missed.items()},
        "causes": _causes(missed, sites.get("attention", []), found),
        "reasons": _reasons(sites.get("attention", []), found),
    }


def _elements(linear: Iterable[Any], canonical: Callable[[str], str]) -> Counter[str]:
    """Elements of each parameter that belong to a site; all of them where a matrix is computed from several."""
    found: Counter[str] = Counter()
    for site in linear:
        names = {canonical(w) for w in site.weights}
        for name in names:
            found[name] += site.parameters if len(names) == 1 else sys.maxsize
    return found


def module_path(node: fx.Node | None) -> str:
    """Path of the module that computed a value."""
    stack = node.meta.get("nn_module_stack") if node is not None else None
    if not stack:
        return ""
    return ".".join(step.split("@")[0] for step in str(list(stack.values())[-1][0]).split("."))


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def _blocks(run: Counter[str], program: Program) -> Counter[str]:
    """Attention blocks by module: where the eager run went through segments one by one, the program may do all at once."""
    aten = torch.ops.aten
    cores = {aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default}
    once = Counter(module_path(n) for n in program.graph.nodes if n.target in cores)
    return Counter({path: min(count, once[path] or count) for path, count in run.items()})


def _at_paths(wanted: Counter[str], sites: Iterable[Any], missed: dict[str, list[str]]) -> int:
    there = Counter(module_path(site.node) for site in sites)
    total = 0
    for path, count in wanted.items():
        got = min(count, there[path])
        there[path] -= got
        if got < count:  # the site's last value may be a module further out or in
            for other in [p for p in there if p and there[p] > 0 and (_within(p, path) or _within(path, p))]:
                more = min(count - got, there[other])
                there[other] -= more
                got += more
        total += got
        if got < count:
            missed.setdefault("attention", []).append(path)
    return total


def _mixtures(
    wanted: dict[str, Any], sites: list[Any], canonical: Callable[[str], str], missed: dict[str, list[str]]
) -> int:
    total = 0
    for path, routed in wanted.items():
        names = {canonical(n) for n in routed.parameters}
        for site in sites:
            named = [{canonical(w) for piece in expert.values() for w in piece.weights} for expert in site.experts]
            if site.router is not None and len(named) == routed.experts and all(one & names for one in named):
                total += 1
                break
        else:
            missed.setdefault("moe", []).append(path)
    return total


def _norms(
    wanted: dict[str, str], sites: list[Any], canonical: Callable[[str], str], missed: dict[str, list[str]]
) -> int:
    weights = {canonical(w) for site in sites for w in site.weights}
    # Of the value itself, and of its statistics: a site may go on into the next module, whose vector is then its weight.
    statistics = {
        n for site in sites for n in site.nodes if n.target in (torch.ops.aten.mean.dim, torch.ops.aten.var.dim)
    }
    paths = {module_path(node) for node in (*(site.node for site in sites), *statistics)}
    total = 0
    for path in wanted:
        if canonical(f"{path}.weight") in weights or path in paths:
            total += 1
        else:
            missed.setdefault("norms", []).append(path)
    return total


def _incomplete(sites: Iterable[Any]) -> list[Any]:
    """Attention sites that lack a linear; their notes say which and why."""
    return [s for s in sites if s.kind == "attention" and not (s.q and s.k and s.v and s.o)]


def _causes(missed: dict[str, list[str]], attention: list[Any], found: Recognition) -> dict[str, str]:
    """For each kind of which something was missed, the first reason that speaks of it."""
    causes = {}
    for kind, names in missed.items():
        own = [m.reason for m in found.misses if m.kind == _KINDS.get(kind)]
        if kind == "matrices":
            own = [m.reason for name in names for m in found.misses if m.name == name]
        if kind == "attention":
            own += ["; ".join(n for n in site.notes if n[1:2] == ":") for site in _incomplete(attention)]
        if own:
            causes[kind] = own[0][:300]
    return causes


def _reasons(attention: list[Any], found: Recognition) -> list[str]:
    told = [f"{m.kind} {m.name}: {m.reason}" for m in found.misses if m.kind not in _PLAIN]
    told += [f"attention {s.name}: {'; '.join(n for n in s.notes if n[1:2] == ':')}" for s in _incomplete(attention)]
    told += [f"{m.kind} {m.name}: {m.reason}" for m in found.misses if m.kind in _PLAIN]
    return [line[:300] for line in told[:40]]


def _unexplained(missed: dict[str, list[str]], program: Program, found: Recognition) -> list[str]:
    """What was missed and no near miss tells of: none by its name, nor one at a value of the same module."""
    by_name = {node.name: node for node in program.graph.nodes}
    told = {m.name for m in found.misses if m.reason}
    paths = {module_path(by_name.get(m.node) or by_name.get(m.name)) for m in found.misses if m.reason} - {""}
    paths |= {module_path(site.node) for site in _incomplete(found.sites)} - {""}
    near = {  # the module that holds what a near miss is of, such as a router beside its experts
        kind: {module_path(by_name.get(m.node) or by_name.get(m.name)) for m in found.misses if m.kind == kind}
        for kind in ("moe", "attention")
    }
    near["attention"] |= {module_path(site.node) for site in _incomplete(found.sites)}
    near = {kind: {path.rpartition(".")[0] for path in told} - {""} for kind, told in near.items()}
    silent = []
    for kind, names in missed.items():
        for name in names:
            path = name.rpartition(".")[0] if kind == "matrices" else name
            spoken = name in told or any(t.startswith(name) for t in told) or any(_within(p, path) for p in paths)
            spoken = spoken or any(_within(path, n) for n in near.get(kind, ()))
            if not spoken and not (kind == "attention" and any(_within(path, p) for p in paths)):
                silent.append(f"{kind} {name}")
    return silent


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def gap(got: list[Tensor], expected: list[Tensor], *, exact_count: bool = True) -> str:
    """Where two lists of results differ by more than rounding of a whole network; empty if nowhere."""
    if exact_count and len(got) != len(expected):
        return f"{len(got)} results instead of {len(expected)}"
    for position, (a, b) in enumerate(zip(got, expected, strict=False)):
        if a.shape != b.shape:
            return f"result {position} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return f"result {position} differs"
            continue
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return f"result {position} is not finite elsewhere"
        scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        off = float((a[finite] - b[finite]).abs().max()) if bool(finite.any()) else 0.0
        if off > 2e-4 * max(scale, 1e-6):
            return f"result {position} differs by {off:.3g}, the largest value is {scale:.3g}"
    return ""
