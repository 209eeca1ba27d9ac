"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "change_text", "count_text", "error_text", "milliseconds_text", "times_text"]


def bytes_text(count: float) -> str:
    """Bytes in decimal units, three figures.

    Examples
    --------
    >>> bytes_text(999), bytes_text(22_713_728), bytes_text(1_500_000_000)
    ('999 B', '22.7 MB', '1.50 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """A count with a short suffix: thousands k, millions M, and so on.

    Examples
    --------
    >>> count_text(512), count_text(10_616_832), count_text(2.1e10)
    ('512', '10.6 M', '21.0 G')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f}"


def error_text(error: float | None) -> str:
    """A relative error: in percent, or as a power of ten where that is shorter; a dash where none was measured.

    Examples
    --------
    >>> error_text(0.0123), error_text(3.2e-7), error_text(0.0), error_text(None)
    ('1.23 %', '3.2e-07', '0', '–')
    """
    if error is None:
        return "–"
    if not math.isfinite(error):
        return str(error)
    if error == 0:
        return "0"
    return f"{_three(error * 100)} %" if abs(error) >= 1e-4 else f"{error:.1e}"


def milliseconds_text(value: float | None) -> str:
    """Milliseconds, three figures; a dash where nothing was timed.

    Examples
    --------
    >>> milliseconds_text(0.1234), milliseconds_text(56.78), milliseconds_text(None)
    ('0.123 ms', '56.8 ms', '–')
    """
    return "–" if value is None else f"{_three(value)} ms"


def times_text(before: float, after: float) -> str:
    """How many times smaller (or faster) `after` is.

    Examples
    --------
    >>> times_text(100, 25), times_text(3, 4), times_text(1, 0)
    ('4.00×', '0.750×', '–')
    """
    return f"{_three(before / after)}×" if after else "–"


def change_text(before: float, after: float) -> str:
    """By how much something shrank or grew.

    Examples
    --------
    >>> change_text(100, 25), change_text(3, 4), change_text(2, 2), change_text(0, 2)
    ('4.00× smaller', '1.33× larger', 'same', '–')
    """
    if before == after:
        return "same"
    if not before or not after:
        return "–"
    return f"{times_text(before, after)} smaller" if after < before else f"{times_text(after, before)} larger"


def _three(value: float) -> str:
    """Three significant figures without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"
