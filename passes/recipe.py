"""`Recipe`: what is asked for, as text, YAML, a dict or an object."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from recast.passes.forms.form import Form
from recast.patterns.errors import FormError, RecipeError, nearest

__all__ = ["COMPUTE_DTYPES", "Recipe", "Rule"]

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KINDS = ("linear", "mlp", "attention", "moe", "*")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a recipe: sites whose name matches get a form.

    Parameters
    ----------
    match
        A glob over site names (``encoder.*.query``; parts of packed weights as ``h.0.attn.c_attn.q``), or a regular
        expression after ``re:`` that must match the whole name.
    form
        What they get; None keeps them dense.
    kind
        Kind of site, ``linear``, ``mlp``, ``attention`` or ``moe``; ``*`` is every kind that the form is for.
    """

    match: str
    form: Form | None
    kind: str = "*"

    def matches(self, name: str, kind: str = "linear") -> bool:
        """Whether a site falls under this rule."""
        goes = self.form is None or self.form.site_kind == kind or str(self.form) == "dense"
        return goes and self.kind in ("*", kind.partition(":")[0]) and name_matches(self.match, name)


def name_matches(pattern: str, name: str) -> bool:
    """Whether a glob, or a regular expression after ``re:``, matches a whole name.

    Examples
    --------
    >>> name_matches("*.query", "layer.0.query"), name_matches("re:.*query", "layer.0.key")
    (True, False)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Parameters
    ----------
    default
        Form of every site that no rule names; None keeps them dense.
    rules
        Tried in order; the first that matches decides.
    exclude
        Names (globs, ``re:``) that stay dense whatever else matches.
    compute_dtype
        ``fp32``, ``bf16`` or ``fp16`` for weights and activations; None leaves them.
    budget
        Share of the dense bytes that the sites to be rewritten may use. What rules name counts and is spent first; for every other
        site a form is chosen among dense, `default` and `candidates`, so that the sum of squared output errors is least (a
        multiple-choice knapsack, solved exactly).
    candidates
        Forms to choose from under a budget, besides dense and `default`.
    min_coverage
        Least share of matrix parameters that must be matched, else planning fails.
    allow_larger
        Carry a form out even where it takes more bytes and more operations than dense.
    tied
        Also rewrite weights that something else keeps alive in dense form (an embedding), without being named by a rule.

    Examples
    --------
    >>> str(Recipe.of("low_rank(ratio=0.5) | int8").default)
    'low_rank(ratio=0.5) | int8'
    """

    default: Form | None = None
    rules: tuple[Rule, ...] = ()
    exclude: tuple[str, ...] = ()
    compute_dtype: str | None = None
    budget: float | None = None
    candidates: tuple[Form, ...] = ()
    min_coverage: float = 0.0
    allow_larger: bool = False
    tied: bool = False

    @property
    def digest(self) -> str:
        """Digest of everything that is asked for, 16 hex digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @staticmethod
    def of(value: Recipe | Form | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a form's text, a path to a YAML file, a dict, a form, or a recipe.

        Raises
        ------
        RecipeError
            A key is unknown (the nearest right one is named), or a value has the wrong type.
        FormError
            A form cannot be read.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Form):
            return Recipe(default=value)
        if isinstance(value, Mapping):
            return _from_dict(value, "recipe")
        if not isinstance(value, str | os.PathLike):
            raise RecipeError(
                f"recipe: a form's text, a path to a YAML file, a dict, a Form or a Recipe is needed, not {value!r}"
            )
        text = os.fspath(value)
        if text.endswith((".yaml", ".yml")) or (os.sep in text and Path(text).is_file()):
            return _from_file(Path(text))
        return Recipe(default=Form.parse(text))

    def check(self) -> None:
        """Raise RecipeError where a budget has nothing to choose from, or candidates have no budget to be chosen under."""
        offered = [f for f in (self.default, *self.candidates) if f is not None and str(f) != "dense"]
        if self.budget is not None and not offered:
            others = "; what rules name is not its choice" if self.rules else ""
            raise RecipeError(
                f"recipe: a budget of {self.budget * 100:.4g}% has nothing to choose from, there are no candidates and no "
                f"default{others}; add candidates: [int8, int4], or default: int8"
            )
        if self.budget is None and self.candidates:
            raise RecipeError(
                f"recipe: candidates ({', '.join(map(str, self.candidates))}) are chosen from under a budget, and there is none; "
                f"add budget: 0.5 (a share of the dense bytes), or one of them as default: {self.candidates[0]}"
            )

    def form_for(self, name: str, kind: str = "linear", *, whole: str | None = None) -> tuple[Form | None, str]:
        """Form of a site, and which line of the recipe decided.

        Parameters
        ----------
        name, kind
            Of the site.
        whole
            Where `name` is a part of a packed weight, the name of that site: what speaks of it speaks of its parts.
        """
        known = (name,) if whole is None else (name, whole)
        if (pattern := self.excludes(*known)) is not None:
            return None, f"excluded by '{pattern}'"
        for rule in self.rules:
            if any(rule.matches(n, kind) for n in known):
                return rule.form, f"rule '{rule.match}'"
        return self.default if self.default is not None and self.default.site_kind == kind else None, "default"

    def excludes(self, *names: str) -> str | None:
        """The pattern that keeps any of some names dense, if there is one."""
        return next((p for p in self.exclude if any(name_matches(p, name) for name in names)), None)

    def names(self, name: str, kind: str = "linear") -> bool:
        """Whether a rule (not the default, not a bare ``*``) speaks of this site."""
        return any(r.match != "*" and r.matches(name, kind) for r in self.rules)

    def of_several_matrices(self) -> list[tuple[Form, str]]:
        """Forms that are no matter of one matrix by itself, and what they are instead."""
        found = []
        for form in (self.default, *self.candidates, *(rule.form for rule in self.rules)):
            if form is not None and form.site_kind != "linear":
                found.append((form, "is a form of a whole block"))
            elif form is not None and form.shared_part is not None:
                found.append((form, "is shared between sites"))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-able form; `Recipe.of` reads it back."""
        found: dict[str, Any] = {}
        if self.default is not None:
            found["default"] = str(self.default)
        if self.rules:
            found["rules"] = [
                {
                    "match": r.match,
                    "form": str(r.form) if r.form else "dense",
                    **({"kind": r.kind} if r.kind != "*" else {}),
                }
                for r in self.rules
            ]
        if self.exclude:
            found["exclude"] = list(self.exclude)
        if self.candidates:
            found["candidates"] = [str(f) for f in self.candidates]
        for name in ("compute_dtype", "budget", "min_coverage", "allow_larger", "tied"):
            field = next(f for f in dataclasses.fields(self) if f.name == name)
            if getattr(self, name) != field.default:
                found[name] = getattr(self, name)
        return found

    def __str__(self) -> str:
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))


def _from_file(path: Path) -> Recipe:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"recipe: '{path}' cannot be read: {error.strerror}; give a form such as int8, or a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe: '{path}' is not text: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise RecipeError(f"recipe: '{path}' is not valid YAML: {error}") from error
    if isinstance(data, str):
        return Recipe(default=Form.parse(data))
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"recipe: '{path}' holds {type(data).__name__}, a mapping with 'default' or 'rules' is needed"
        )
    return _from_dict(data, str(path))


def _from_dict(data: Mapping[str, Any], where: str) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)}
    for key in data:
        if key not in known:
            raise RecipeError(f"recipe: unknown key '{key}' in {where}; {nearest(str(key), known)}")
    given = dict(data)
    values: dict[str, Any] = {}
    if given.get("default") is not None:
        values["default"] = _form(given["default"], _in(where, "default"))
    values["rules"] = tuple(
        _rule(r, _in(where, f"rules[{i}]")) for i, r in enumerate(_list(given.get("rules"), where, "rules"))
    )
    values["exclude"] = tuple(_pattern(p, _in(where, "exclude")) for p in _list(given.get("exclude"), where, "exclude"))
    values["candidates"] = tuple(
        _form(f, _in(where, "candidates")) for f in _list(given.get("candidates"), where, "candidates")
    )
    if given.get("compute_dtype") is not None:
        name = given["compute_dtype"]
        if not isinstance(name, str) or name not in COMPUTE_DTYPES:
            raise RecipeError(
                f"recipe: compute_dtype '{name}' in {where} is unknown; {nearest(str(name), COMPUTE_DTYPES)}"
            )
        values["compute_dtype"] = name
    for name in ("budget", "min_coverage"):
        if given.get(name) is not None:
            values[name] = _share(given[name], name, where)
    for name in ("allow_larger", "tied"):
        if name in given:
            if not isinstance(given[name], bool):
                raise RecipeError(f"recipe: {name} in {where} must be true or false, not {given[name]!r}")
            values[name] = given[name]
    return Recipe(**values)


def _in(where: str, place: str) -> str:
    """A place in a recipe: with the file, where it came from one."""
    return place if where == "recipe" else f"{where}: {place}"


def _share(value: Any, name: str, where: str) -> float:
    text = str(value).strip().removesuffix("x")
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1 or (name == "budget" and number == 0):
        raise RecipeError(f"recipe: {name} in {where} must be a share such as 0.4 (or 0.4x, 40%), not {value!r}")
    return number


def _list(value: Any, where: str, key: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RecipeError(f"recipe: '{key}' in {where} must be a list, not {type(value).__name__}")
    return list(value)


def _form(value: Any, where: str) -> Form:
    if isinstance(value, Form):
        return value
    if not isinstance(value, str):
        raise RecipeError(f"recipe: {where} must be a form's text such as int8, not {value!r}")
    try:
        return Form.parse(value)
    except FormError as error:
        raise FormError(f"{error}\n(in the recipe, {where})") from error


def _pattern(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"recipe: {where} must be a glob or 're:' pattern over site names, not {value!r}")
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise RecipeError(f"recipe: {where}: '{value}' is not a regular expression: {error}") from error
    return value


def _rule(value: Any, where: str) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"recipe: {where} must be a mapping with 'match' and 'form', not {value!r}")
    for key in value:
        if key not in ("match", "form", "kind"):
            raise RecipeError(f"recipe: unknown key '{key}' in {where}; {nearest(str(key), ('match', 'form', 'kind'))}")
    if "form" not in value:
        raise RecipeError(f"recipe: {where} has no 'form'; write form: dense to keep the sites as they are")
    kind = value.get("kind", "*")
    if kind not in _KINDS:
        raise RecipeError(f"recipe: kind '{kind}' in {where} is unknown; {nearest(str(kind), _KINDS)}")
    form = _form(value["form"], where)
    own = form.site_kind.partition(":")[0]
    if kind not in ("*", own) and str(form) != "dense":
        raise RecipeError(
            f"recipe: {where} gives '{form}', a form of kind {own}, to sites of kind {kind}; kind: {own} would work"
        )
    return Rule(_pattern(value.get("match", "*"), where), form, kind)
