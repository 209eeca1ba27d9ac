"""Every form there is: those of the files in this folder, and those that other packages bring."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from recast.passes.forms.form import NamedForm
from recast.patterns.errors import FormError, nearest

__all__ = ["discover", "form_named", "forms"]

_discovered = False


def discover() -> None:
    """Import the files of this folder and the entry points of the group ``recast.forms``: each registers its forms."""
    global _discovered  # noqa: PLW0603  # done once a process
    if _discovered:
        return
    package = importlib.import_module("recast.passes.forms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"recast.passes.forms.{module.name}")
    for entry in importlib.metadata.entry_points(group="recast.forms"):
        try:
            entry.load()
        except Exception as error:
            raise FormError(
                f"forms: the entry point {entry.name!r} ({entry.value}) of another package failed to load: {error}; "
                "repair or uninstall that package"
            ) from error
    _discovered = True


def forms() -> dict[str, type[NamedForm]]:
    """Return every named form, by name.

    Examples
    --------
    >>> [name for name in forms() if name.startswith("int")]
    ['int2', 'int3', 'int4', 'int8']
    """
    discover()
    return dict(sorted(NamedForm._names.items()))


def form_named(name: str) -> type[NamedForm]:
    """Return the form of that name; raises FormError with the nearest name there is."""
    known = forms()
    if name not in known:
        raise FormError(f"unknown form {name!r}; {nearest(name, known)}")
    return known[name]
