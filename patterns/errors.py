"""Errors a user can cause, each saying what was asked, what was found, where, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "CoverageError",
    "FormError",
    "GenerationError",
    "ModelError",
    "PlanError",
    "RecastError",
    "RecipeError",
    "TargetError",
    "VerificationError",
    "WeightError",
    "nearest",
]


class RecastError(Exception):
    """Base of every error that recast raises for bad input; the command line prints it without a traceback."""


class FormError(RecastError, ValueError):
    """A form expression is malformed, or does not fit the weight it is asked for."""


class WeightError(RecastError, ValueError):
    """A weight cannot be rewritten: it holds NaN or infinity, or its storage was released."""


class CaptureError(RecastError, RuntimeError):
    """A model cannot be captured as one graph."""


class ModelError(RecastError, ValueError):
    """A model was named that does not exist or cannot be read."""


class CalibrationError(RecastError, ValueError):
    """Calibration data or statistics are empty, wrongly shaped, not finite, or belong to another model."""


class GenerationError(RecastError, ValueError):
    """Text cannot be generated: the artifact keeps no cache, or a prompt or an option does not fit."""


class RecipeError(RecastError, ValueError):
    """A recipe has an unknown key, a wrong value, or a rule that cannot be read."""


class PlanError(RecastError, ValueError):
    """A plan does not belong to this program, or asks for something that cannot be done."""


class TargetError(RecastError, ValueError):
    """A lowering target is unknown, not installed, or cannot express what the plan asks for."""


class ArtifactError(RecastError, ValueError):
    """A saved artifact is missing, damaged, or from an incompatible version."""


class CoverageError(RecastError, RuntimeError):
    """Fewer parameters were matched than the caller demanded."""


class VerificationError(RecastError, RuntimeError):
    """A pass broke an invariant of the program; this is a defect of the pass, not of the input."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is closest to a mistyped one, as the end of an error message.

    Examples
    --------
    >>> nearest("low_rnak", ["low_rank", "int8"])
    "did you mean 'low_rank'? known: int8, low_rank"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"
