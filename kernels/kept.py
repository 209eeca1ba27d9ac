"""Where recast keeps what took long to find out: fitted operators, measured times, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path | None:
    """Where fitted operators are kept: ``$RECAST_CACHE``, else ``~/.cache/recast``; None if it is set to ``off``."""
    asked = os.environ.get("RECAST_CACHE", "")
    if asked.lower() in ("off", "0", "none"):
        return None
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "recast"
