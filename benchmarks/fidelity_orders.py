"""The orders of methods that papers publish, held against what was measured here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.fidelity_rows import key_of, said

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]
CUTS = (0.9, 0.8, 0.7, 0.6)
# Less is better, in this order of preference: what a model has of them is compared.
MEASURES = ("perplexity", "cosine_lost")


def check_orders(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare, for every model that has the rows; an order without its rows is left out for that model."""
    known = {key_of(row): dict(row) | _lost(row) for row in rows if "failed" not in row}
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found += _low_rank(known, model) + _attention(known, model) + _sparse(known, model) + _rounding(known, model)
        found += _corrected(known, model) + _experts(known, model)
    return found


def _lost(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"cosine_lost": 1 - row["cosine"]} if "cosine" in row else {}


def compare(
    rows: Rows, model: str, order: str, names: Sequence[str], budget: float | str | None, measure: str | None = None
) -> list[dict[str, Any]]:
    """Say whether the figures of some forms rise in the order of their names; equal ones count as in order.

    Nothing is said if a row is missing.
    """
    found = [rows.get((model, name, said(budget))) for name in names]
    present = [row for row in found if row is not None]
    if len(present) < len(names):
        return []
    measure = measure or next(m for m in MEASURES if m in present[0])
    values = [float(row[measure]) for row in present]
    holds = all(a <= b for a, b in itertools.pairwise(values))
    return [_answer(order, model, said(budget), holds, measure, dict(zip(names, values, strict=True)))]


def _answer(
    order: str, model: str, at: str, holds: bool | None, measure: str, values: Mapping[str, float]
) -> dict[str, Any]:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return {
        "order": order,
        "model": model,
        "at": at,
        "holds": holds,
        "figures": f"{measure.replace('_', ' ')}: {listed}",
    }


def _low_rank(rows: Rows, model: str) -> list[dict[str, Any]]:
    found = []
    for budget in CUTS:
        found += compare(rows, model, "whitened < ASVD < plain SVD", ("low_rank", "asvd", "svd"), budget)
        found += compare(rows, model, "whitened < FWSVD < plain SVD", ("low_rank", "fwsvd", "svd"), budget)
        order = "whitened in the order of the model <= all at once"
        found += compare(rows, model, order, ("low_rank, in order", "low_rank"), budget)
        for name in ("nystrom, MLPs", "svd_vo, values"):
            order = f"MoDeGPT ({name}) below whitened SVD at equal cut"
            found += compare(rows, model, order, (name, f"low_rank, {name.partition(', ')[2]}"), budget)
    for budget in CUTS[1:]:
        found += compare(rows, model, "CoSpaDi below whitened SVD", ("sparse_dictionary", "low_rank"), budget)
    return found


def _attention(rows: Rows, model: str) -> list[dict[str, Any]]:
    """The best number of atoms counts: it is a parameter of the method."""
    found = []
    for budget in (0.8, 0.7):
        tried = [f"shared_atoms({atoms}), attention" for atoms in (1, 2, 3, 4)]
        have = [rows[key] for name in tried if (key := (model, name, said(budget))) in rows]
        if have:
            measure = next(m for m in MEASURES if m in have[0])
            best = min(have, key=lambda row: float(row[measure]))["form"]
            order = "MASA below whitened SVD of each layer (attention only)"
            found += compare(rows, model, order, (best, "low_rank, attention"), budget)
    return found


def _sparse(rows: Rows, model: str) -> list[dict[str, Any]]:
    names = ("2:4 sparsegpt", "2:4 wanda", "2:4 magnitude")
    found = compare(rows, model, "SparseGPT <= Wanda < magnitude at 2:4", names, None)
    triple = [rows.get((model, name, "own")) for name in ("dense", "2:4 nowag", "2:4 armor")]
    if all(row is not None for row in triple):
        measure = next(m for m in MEASURES if m in (triple[0] or {}))
        dense, start, end = (float(row[measure]) for row in triple if row is not None)
        closed = (start - end) / (start - dense)
        values = {"dense": dense, "NoWag-P": start, "ARMOR": end, "gap closed": closed}
        order = "ARMOR closes 40 % of the gap of NoWag-P"
        found.append(_answer(order, model, "own", closed >= 0.4, measure, values))
    return found


def _rounding(rows: Rows, model: str) -> list[dict[str, Any]]:
    found = []
    for bits in (4, 3):
        plain = f"int{bits} nearest"
        for name in ("gptq", "awq"):
            order = f"{name.upper()} below rounding to nearest at {bits} bits"
            found += compare(rows, model, order, (f"int{bits} {name}", plain), None)
        order = f"QuantEase <= GPTQ in layer error at {bits} bits"
        names = (f"int{bits} quantease", f"int{bits} gptq")
        found += compare(rows, model, order, names, None, "layer_error_on_calibration")
        found += compare(rows, model, order, names, None, "layer_error")
    return found


def _corrected(rows: Rows, model: str) -> list[dict[str, Any]]:
    """Rounded to nearest with a correction, against finer groups of the same bytes; then the same over GPTQ."""
    found = []
    for bits in (3, 2):
        as_much = f"int{bits}(group=32)"
        plain = f"int{bits}, groups of 32"
        for name, other in (
            (f"lorc int{bits}", "nearest"),
            (f"lq nf{bits}", "nearest"),
            (f"lq int{bits}", "nearest"),
            (f"lorc int{bits} gptq", "gptq"),
        ):
            ours, theirs = rows.get((model, name, said(as_much))), rows.get((model, f"{plain} {other}", "own"))
            if ours is None or theirs is None:
                continue
            measure = next(m for m in MEASURES if m in ours)
            a, b = float(ours[measure]), float(theirs[measure])
            method = f"LQ over {name.split()[1]}" if name.startswith("lq") else "LORC"
            order = f"{method} below plain rounding ({other}) at equal bytes, {bits} bits"
            found.append(_answer(order, model, said(as_much), a <= b, measure, {name: a, f"{plain} {other}": b}))
    return found


def _experts(rows: Rows, model: str) -> list[dict[str, Any]]:
    """One basis for all experts of a layer, against one matrix for all of them, of the same bytes."""
    found = []
    union = rows.get((model, "union svd of experts", "as shared_atoms(1)"))
    for name, order in (
        ("experts averaged", "union SVD of experts below averaging them"),
        ("experts merged to one", "union SVD of experts below merging them by least squares"),
    ):
        other = rows.get((model, name, "own"))
        if union is not None and other is not None:
            values = {"union": float(union["perplexity"]), name: float(other["perplexity"])}
            found.append(_answer(order, model, "as one expert", values["union"] <= values[name], "perplexity", values))
    return found


def orders_table(orders: list[dict[str, Any]]) -> Table:
    """Order, whether it holds, figures."""
    table = Table(title="published orders", title_justify="left")
    for heading in ("model", "order", "at", "holds"):
        table.add_column(heading)
    table.add_column("figures", overflow="fold")
    for entry in orders:
        holds = {True: "yes", False: "no", None: "not measured"}[entry["holds"]]
        style = {True: "", False: "red", None: "dim"}[entry["holds"]]
        table.add_row(entry["model"], entry["order"], entry["at"], holds, entry["figures"], style=style)
    return table
