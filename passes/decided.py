"""`Plan`: what is decided for every site, as text one can read, edit and apply again."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recast.passes.calibration import Calibration
from recast.passes.forms.form import Form
from recast.passes.recipe import COMPUTE_DTYPES
from recast.patterns.errors import FormError, PlanError, nearest

__all__ = ["Entry", "Plan", "Skip"]

_VERSION = 1
_KEYS = ("version", "model", "statistics", "compute_dtype", "coverage", "recipe", "sites", "skipped", "notes")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Decision for one site, or for one part of a packed weight.

    Parameters
    ----------
    name
        Site name, or ``site.part``.
    form
        What it gets.
    bytes_before, bytes_after
        Of the weight.
    flops_before, flops_after
        For one token.
    predicted_error
        Relative error ``|(W - W')X| / |WX|`` of the site's output on the calibration data; without one, of the weight.
    predicted_weight_error
        ``|W - W'| / |W|``.
    """

    name: str
    form: Form
    bytes_before: int = 0
    bytes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    predicted_error: float = 0.0
    predicted_weight_error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-able form."""
        return {
            "form": str(self.form),
            "predicted_error": float(f"{self.predicted_error:.6g}"),
            "predicted_weight_error": float(f"{self.predicted_weight_error:.6g}"),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
        }


@dataclasses.dataclass(frozen=True)
class Skip:
    """A site that stays dense, and why."""

    name: str
    reason: str


@dataclasses.dataclass
class Plan:
    """Decisions for a program. ``str(plan)`` is YAML; only ``form`` of each site and ``compute_dtype`` need be there.

    Parameters
    ----------
    fingerprint
        Of the program decided on.
    entries
        By name.
    skipped
        Sites that stay dense.
    compute_dtype
        ``fp32``, ``bf16``, ``fp16``, or None for as it is.
    recipe
        What was asked, for the record.
    statistics
        Fingerprint-independent hash of the calibration used, or None.
    calibration
        The statistics themselves, when still at hand (not part of the text).
    coverage
        Share of matrix parameters matched.
    notes
        What should be known of the decisions, such as that there was little data; the report repeats them.
    """

    fingerprint: str
    entries: dict[str, Entry]
    skipped: list[Skip] = dataclasses.field(default_factory=list)
    compute_dtype: str | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    statistics: str | None = None
    calibration: Calibration | None = dataclasses.field(default=None, repr=False, compare=False)
    coverage: float = 1.0
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-able form."""
        return {
            "version": _VERSION,
            "model": self.fingerprint,
            "statistics": self.statistics,
            "compute_dtype": self.compute_dtype,
            "coverage": round(self.coverage, 6),
            "recipe": self.recipe,
            "sites": {name: entry.to_dict() for name, entry in self.entries.items()},
            "skipped": [dataclasses.asdict(s) for s in self.skipped],
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def __str__(self) -> str:
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, width=120))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML, under a temporary name first."""
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", text=True)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(str(self))
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @staticmethod
    def parse(text: str, where: str = "plan") -> Plan:
        """Read a plan from YAML; a name under both ``sites`` and ``skipped`` is a site.

        Raises
        ------
        PlanError
            It is not YAML, a key is unknown, ``sites`` is missing, or a value is of another kind.
        """
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
            raise PlanError(f"plan: '{where}' is not valid YAML: {error}") from error
        needed = "a mapping with 'model' and 'sites' is needed, as str(plan) writes it"
        if not isinstance(data, Mapping):
            raise PlanError(f"plan: '{where}' is not a plan, it holds {_kind(data)}: {needed}")
        for key in data:
            if key not in _KEYS:
                raise PlanError(f"plan: unknown key '{key}' in '{where}'; {nearest(str(key), _KEYS)}")
        if "sites" not in data:
            raise PlanError(
                f"plan: '{where}' has no 'sites': {needed}; 'sites: {{layer: {{form: int8}}}}' would rewrite one, 'sites: {{}}' none"
            )
        sites = _value(data, "sites", Mapping, "a mapping from names to forms, as 'layer: {form: int8}'", where) or {}
        version = data.get("version", _VERSION)
        if isinstance(version, bool) or version != _VERSION:
            raise PlanError(f"plan: '{where}' is of version {version}; this recast reads version {_VERSION}")
        dtype = _value(data, "compute_dtype", str, "text such as bf16", where)
        if dtype is not None and dtype not in COMPUTE_DTYPES:
            raise PlanError(
                f"plan: compute_dtype '{dtype}' in '{where}' is unknown; {nearest(str(dtype), COMPUTE_DTYPES)}"
            )
        entries: dict[str, Entry] = {}
        for name, row in sites.items():
            if str(name) in entries:  # 0 and '0', say
                raise PlanError(f"plan: site '{name}' is there twice in '{where}'; keep one of the two")
            entries[str(name)] = _entry(str(name), row, where)
        skipped = _value(data, "skipped", list, "a list of name and reason", where) or []
        quoted = "text as str(plan) writes it, digits in quotes"
        return Plan(
            fingerprint=_value(data, "model", str, quoted, where) or "",
            entries=entries,
            # Who adds a site need not look for it among those that stay dense.
            skipped=[skip for row in skipped if (skip := _skip(row, where)).name not in entries],
            compute_dtype=dtype,
            recipe=dict(_value(data, "recipe", Mapping, "a mapping", where) or {}),
            statistics=_value(data, "statistics", str, quoted, where),
            coverage=_number(data.get("coverage", 1.0), "coverage", where),
            notes=[str(note) for note in _value(data, "notes", list, "a list of lines", where) or []],
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; see `parse`."""
        try:
            return Plan.parse(Path(path).read_text(encoding="utf-8"), os.fspath(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan: '{path}' cannot be read: {error}") from error


def _entry(name: str, row: Any, where: str) -> Entry:
    if isinstance(row, str):
        row = {"form": row}
    if not isinstance(row, Mapping) or "form" not in row:
        raise PlanError(f"plan: site '{name}' in '{where}' has no form; write '{name}: {{form: int8}}'")
    fields = {f.name for f in dataclasses.fields(Entry)} - {"name", "form"}
    for key in row:
        if key != "form" and key not in fields:
            raise PlanError(
                f"plan: unknown key '{key}' at site '{name}' in '{where}'; {nearest(str(key), fields | {'form'})}"
            )
    if not isinstance(row["form"], str):
        raise PlanError(
            f"plan: form of site '{name}' in '{where}' must be text such as int8, not {_kind(row['form'])} {row['form']!r}"
        )
    try:
        form = Form.parse(row["form"])
    except FormError as error:
        raise PlanError(f"plan: site '{name}' in '{where}': {error}") from error
    numbers = {k: _number(row[k], f"{k} of site '{name}'", where, finite="error" not in k) for k in row if k != "form"}
    values: dict[str, Any] = {k: v if "error" in k else int(v) for k, v in numbers.items()}
    return Entry(name, form, **values)


def _value(data: Mapping[str, Any], key: str, kind: type, wanted: str, where: str) -> Any:
    """What stands at a key, of a kind; None where there is nothing."""
    value = data.get(key)
    if value is not None and not isinstance(value, kind):
        raise PlanError(
            f"plan: '{key}' in '{where}' must be {wanted}, not {_kind(value)} {value!r}"
            + ("" if key == "sites" else "; it may be left out")
        )
    return value


def _kind(value: Any) -> str:
    """What YAML made of a value, in words."""
    if value is None:
        return "nothing"
    return {dict: "a mapping", list: "a list", str: "the text", bool: "the truth value"}.get(
        type(value), f"the {type(value).__name__}"
    )


def _number(value: Any, what: str, where: str, *, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or (finite and not math.isfinite(value)):
        raise PlanError(f"plan: {what} in '{where}' must be a number, not {value!r}; it may be left out")
    return value


def _skip(row: Any, where: str) -> Skip:
    if not isinstance(row, Mapping) or set(row) != {"name", "reason"}:
        raise PlanError(
            f"plan: 'skipped' in '{where}' must be a list of name and reason, not {row!r}; it may be left out"
        )
    return Skip(str(row["name"]), str(row["reason"]))
