"""Progress bars for what takes long: on a terminal by default, silent otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["track"]

T = TypeVar("T")

# The display that is shown now, if there is one.
_displays: list[Progress] = []


def track(items: Iterable[T], label: str, progress: bool | None = None) -> Iterator[T]:
    """Iterate with a progress bar on standard error.

    Parameters
    ----------
    items
        What is worked through; its length is shown where it has one.
    label
        What is being done.
    progress
        True, False, or None for "when standard error is a terminal".

    Notes
    -----
    A bar that begins while another one runs is a further line of the same display.

    Examples
    --------
    >>> list(track([1, 2, 3], "counting", progress=False))
    [1, 2, 3]
    """
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = len(items) if isinstance(items, Sized) else None
    if _displays:
        bar = _displays[-1]
        task = bar.add_task(label, total=total)
        try:
            for item in items:
                yield item
                bar.advance(task)
        finally:
            bar.remove_task(task)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        _displays.append(bar)
        try:
            task = bar.add_task(label, total=total)
            for item in items:
                yield item
                bar.advance(task)
        finally:
            _displays.remove(bar)
