"""What the commands print, through rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from recast.models import Model
from recast.passes.render.rows import Rows
from recast.passes.render.words import bytes_text, count_text
from recast.patterns.find import Coverage
from recast.patterns.program import Program
from recast.patterns.sites import AttentionSite, LinearSite, MoESite, NormSite, Site

__all__ = ["explanation", "forms_tables", "inspection", "structure_text"]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table; a column whose heading ends in ``>`` is aligned to the right."""
    made = Rows(title, [(column.rstrip(">"), column.endswith(">")) for column in columns])
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def structure_text(site: Site) -> str:
    """What a site of several operations is, in one line."""
    found = site.to_dict()
    if isinstance(site, AttentionSite):
        roles = ", ".join(f"{r} {_short(site.name, found[r])}" for r in ("q", "k", "v", "o") if found[r])
        heads = f"{site.heads} heads" if site.heads == site.kv_heads else f"{site.heads} heads on {site.kv_heads}"
        return f"{heads} of {site.head_dim}, mask {site.mask}; {roles}"
    if isinstance(site, MoESite):
        shared = f", {len(site.shared)} shared" if site.shared else ""
        return f"{len(site.experts)} experts{shared}, {site.top_k} a token, by {site.dispatch}"
    if isinstance(site, NormSite):
        return f"{site.flavour}, {site.features} features, eps {site.eps:g}"
    skip = ("kind", "name", "weights", "pattern", "where")
    return ", ".join(f"{k} {v}" for k, v in found.items() if k not in skip and v not in ("", None, []))


def _short(owner: str, name: str) -> str:
    return name.removeprefix(f"{owner}.")


def inspection(model: Model, program: Program, covered: Coverage) -> list[Any]:
    """What `recast inspect` prints."""
    parameters = sum(w.numel() for w in program.weights.values())
    flops = covered.flops_matched / covered.flops_total if covered.flops_total else 1.0
    size = f"{count_text(parameters)} parameters, {bytes_text(model.nbytes)} stored"
    kinds = Counter(site.kind for site in covered.sites)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "no"
    lines = [
        f"{model.label} ({model.kind}): {size}, {len(program.graph.nodes)} operations",
        f"{counts} sites: {covered.fraction:.1%} of the matrix parameters, {flops:.1%} of the FLOPs",
    ]
    lines += [f"note: {note}" for note in program.notes]
    parts: list[Any] = [Text("\n".join(lines))]
    sites = [s for s in covered.sites if isinstance(s, LinearSite)]
    rows = [
        (
            site.name,
            f"{site.out_features}×{site.in_features}",
            count_text(site.parameters),
            count_text(site.flops),
            site.spelling + (f", {len(site.uses)} uses" if len(site.uses) > 1 else ""),
            ", ".join(p.name for p in site.parts) or ("tied" if site.tied else ""),
            site.where,
        )
        for site in sites
    ]
    if rows:
        parts.append(table("Sites", ["site", "shape>", "parameters>", "FLOPs>", "written as", "parts", "where"], rows))
    parts_of = [
        (s.name, s.kind, structure_text(s), getattr(s, "where", ""))
        for s in covered.sites
        if not isinstance(s, LinearSite)
    ]
    if parts_of:
        parts.append(table("Made of these", ["name", "kind", "what", "where"], parts_of))
    misses = [(m.name, m.kind, count_text(m.parameters), m.reason, m.where) for m in covered.misses]
    if misses:
        parts.append(table("Not matched", ["name", "kind", "parameters>", "reason", "where"], misses))
    else:
        parts.append(Text("nothing was missed"))
    return parts


def explanation(found: Mapping[str, Any]) -> list[Any]:
    """What `recast explain` prints."""
    parts: list[Any] = [Text.assemble((str(found["name"]), "bold"), f": {found['text']}")]
    if found.get("where"):
        parts.append(Text(f"at {found['where']}"))
    for miss in found.get("misses", []):
        where = f" at {miss['where']}" if miss["where"] else ""
        node = f" (value '{miss['node']}'{where})" if miss["node"] else where
        parts.append(Text(f"  {miss['name']}, {miss['kind']}: {miss['reason']}{node}"))
    if found.get("sites"):
        rows = [(s["name"], "×".join(map(str, s["shape"]))) for s in found["sites"]]
        parts.append(table("Sites", ["site", "shape>"], rows))
    if found.get("forms"):
        takes = []
        for form in found["forms"]:
            size = bytes_text(form["bytes"]) if form.get("bytes") else ""
            takes.append((form["form"], size, form.get("problem", "fits")))
        parts.append(table("Forms it could take, for example", ["form", "bytes>", ""], takes))
    return parts


def _told_of_form(row: Mapping[str, Any]) -> Iterator[Any]:
    """What a form is, holds and costs, in words."""
    yield Text(f"\n{row['name'] or row['example']}", style="bold")
    if row["about"]:
        yield Text(row["about"])
    if size := row["size"]:
        m, n = size["shape"]
        yield Text(
            f"{size['form']} of a weight {m} x {n} in bfloat16: {size['share of bytes']:.1%} of its bytes, "
            f"{size['share of operations']:.1%} of its operations for a token."
        )


def forms_tables(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `recast forms` prints."""
    listed = []
    for row in rows:
        if not row["name"]:
            continue
        parameters = "\n".join(
            f"{p['name']}: {p['type']}{'' if p['default'] is None else ' = ' + str(p['default'])}  {p['help']}"
            for p in row["parameters"]
        )
        listed.append((row["name"], row["summary"], parameters))
    targets = list(rows[0]["targets"]) if rows else []
    runs = [(row["example"], *(row["targets"][t] for t in targets)) for row in rows]
    of_forms = [
        table("Forms", ["form", "what it is", "parameters"], listed),
        Text("Forms combine: A + B is a sum, A @ B a product, A | B fits B to what A made."),
    ]
    told = [part for row in rows if row.get("about") or row.get("size") for part in _told_of_form(row)]
    return [
        *(of_forms if listed else ()),
        *told,
        table("What runs them here", ["form", *targets], runs),
    ]
