"""What other packages bring: entry points of a group, loaded with an error that names the one at fault."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from recast.patterns.errors import RecastError

__all__ = ["offered"]


def offered(group: str, what: str, kind: type[RecastError] = RecastError) -> Iterator[tuple[str, Any]]:
    """Load every entry point of a group.

    Parameters
    ----------
    group
        Its name.
    what
        What is offered there, for the message.
    kind
        Of the error.

    Yields
    ------
    Name and place of an entry point as text, and what was loaded.

    Raises
    ------
    RecastError
        One of them cannot be loaded.
    """
    for entry in _entries(group):
        where = f"entry point '{entry.name}' ({entry.value})"
        try:
            thing = entry.load()
        except Exception as error:
            raise kind(
                f"{what}: the {where} of another package failed to load: {type(error).__name__}: {error}; "
                "repair or uninstall that package"
            ) from error
        yield where, thing


@functools.cache
def _entries(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    # Reads the metadata of every installed package; what is installed does not change while a process runs.
    return tuple(importlib.metadata.entry_points(group=group))
