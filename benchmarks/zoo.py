"""The tests' zoo of architectures, for benchmarks: `tests` is on nobody's path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def load() -> ModuleType:
    """The package `tests.zoo`, with all its modules imported."""
    root = str(Path(__file__).resolve().parent.parent)
    # Only while it is imported: from the root, folders of ours would answer to other packages' names (`kernels`).
    sys.path.insert(0, root)
    try:
        zoo = importlib.import_module("tests.zoo")
        importlib.import_module("tests.zoo.truth")
    finally:
        sys.path.remove(root)
    return zoo
