"""Every form there is: those of the files in this folder and of ``passes/modules``, and those that other packages bring."""

from __future__ import annotations

import importlib
import pkgutil
import warnings

from recast.passes.forms.form import NamedForm
from recast.patterns.errors import FormError, nearest
from recast.patterns.plugins import offered

__all__ = ["discover", "form_named", "forms", "module_forms"]

_discovered = False
_finished: set[type[NamedForm]] = set()
_warned: set[type[NamedForm]] = set()


def discover() -> None:
    """Import the files of both folders and the entry points of the group ``recast.forms``: each registers its forms."""
    global _discovered  # noqa: PLW0603  # done once a process
    if _discovered:
        return
    for folder in ("recast.passes.forms", "recast.passes.modules"):
        package = importlib.import_module(folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{folder}.{module.name}")
    for _ in offered("recast.forms", "forms", FormError):
        pass
    _discovered = True


def forms() -> dict[str, type[NamedForm]]:
    """Return every named form of a weight, by name.

    A class that is no form yet is left out with a RuntimeWarning that says what it lacks: it keeps nobody from the others.

    Examples
    --------
    >>> [name for name in forms() if name.startswith("int")]
    ['int2', 'int3', 'int4', 'int8']
    """
    return {name: form for name, form in _every() if form.site_kind == "linear"}


def module_forms() -> dict[str, type[NamedForm]]:
    """Return every named form of a whole block, by name.

    Examples
    --------
    >>> module_forms()["nystrom"].site_kind
    'mlp'
    """
    return {name: form for name, form in _every() if form.site_kind != "linear"}


def _every() -> list[tuple[str, type[NamedForm]]]:
    discover()
    found = []
    for name, form in sorted(NamedForm._names.items()):
        problem = _lacks(name, form)
        if problem is None:
            found.append((name, form))
        elif form not in _warned:
            _warned.add(form)
            warnings.warn(f"{problem}; it is left out until then", RuntimeWarning, stacklevel=3)
    return found


def _lacks(name: str, form: type[NamedForm]) -> str | None:
    """What keeps a class from being a form."""
    if form in _finished:
        return None
    problem = form.unfinished()
    if problem is None:
        _finished.add(form)
        return None
    return f"form {name!r} ({form.__module__}.{form.__qualname__}) {problem}"


def form_named(name: str) -> type[NamedForm]:
    """Return the form of that name; raises FormError with the nearest name there is."""
    known = forms() | module_forms()
    if name not in known:
        if name in NamedForm._names and (problem := _lacks(name, NamedForm._names[name])):
            raise FormError(problem)
        raise FormError(f"unknown form {name!r}; {nearest(name, known)}; forms of other packages need these installed")
    return known[name]
