"""Compiler-style graph rewriting for PyTorch models: raise, rewrite, lower."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# `passes`, `patterns`, `lowering` and `kernels` are relative links to the folders at the top of the repository (wheels
# and sdists hold real folders). A clone without symbolic links has small text files there, and imports would fail
# obscurely.
_absent = [n for n in ("kernels", "lowering", "passes", "patterns") if not (_Path(__file__).parent / n).is_dir()]
if _absent:
    raise ImportError(
        f"recast needs the folders {', '.join(_absent)} beside {__file__}, but found no folders there. "
        "This is a git clone made without symbolic links. Clone again with `git clone -c core.symlinks=true URL` "
        "(on Windows: with developer mode on), or install a wheel."
    )

from recast.compiling import compile  # noqa: A004  # torch.compile with this backend
from recast.generation import Generated, Generator
from recast.lowering.artifact import Artifact, load, lower, optimize
from recast.passes.calibrate import Calibration, calibrate
from recast.passes.forms import Form, Operator
from recast.passes.plan import Plan, plan
from recast.passes.recipe import Recipe, Rule
from recast.passes.report import Report
from recast.passes.rewrite import rewrite
from recast.passes.simplify import simplify
from recast.patterns.capture.export import capture
from recast.patterns.errors import RecastError
from recast.patterns.find import Coverage, coverage, find
from recast.patterns.program import Program
from recast.patterns.sites import (
    AttentionSite,
    EmbeddingSite,
    LinearSite,
    Mismatch,
    MLPSite,
    MoESite,
    NormSite,
    RotarySite,
    Site,
)

__all__ = [
    "Artifact",
    "AttentionSite",
    "Calibration",
    "Coverage",
    "EmbeddingSite",
    "Form",
    "Generated",
    "Generator",
    "LinearSite",
    "MLPSite",
    "Mismatch",
    "MoESite",
    "NormSite",
    "Operator",
    "Plan",
    "Program",
    "RecastError",
    "Recipe",
    "Report",
    "RotarySite",
    "Rule",
    "Site",
    "__version__",
    "calibrate",
    "capture",
    "compile",
    "coverage",
    "find",
    "load",
    "lower",
    "optimize",
    "plan",
    "rewrite",
    "simplify",
]
