"""Side-by-side measurements against peers; `python -m benchmarks.NAME` from the root of the repository."""

import sys
from pathlib import Path

# `python -m` puts the root of the repository on the path, where `kernels`, `passes`, ... would answer to their bare
# names (transformers looks for a package called `kernels`). This package is already found, and recast is installed.
_root = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
