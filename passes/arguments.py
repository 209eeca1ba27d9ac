"""What the functions that a user calls were given, where it is of another kind than they need."""

from __future__ import annotations

from typing import Any

from recast.passes.calibration import Calibration
from recast.passes.decided import Plan
from recast.patterns.errors import CalibrationError, PlanError, RecastError
from recast.patterns.program import Program

__all__ = ["check_batches", "check_calibration", "check_plan", "check_program", "told"]


def told(value: Any) -> str:
    """A value in an error message: its type, and what it is where that is short.

    Examples
    --------
    >>> told("x"), told(None), told([0] * 99)
    ("str 'x'", 'None', 'list')
    """
    text = "" if value is None else repr(value)
    return "None" if value is None else f"{type(value).__name__} {text}" if len(text) < 60 else type(value).__name__


def check_program(value: Any, asked: str, error: type[RecastError]) -> None:
    """Raise an error unless a value is a program."""
    if not isinstance(value, Program):
        raise error(
            f"{asked}: a program is needed, not {told(value)}; recast.capture(model, args) makes one of a model"
        )


def check_calibration(value: Any, asked: str) -> None:
    """Raise CalibrationError unless a value is a calibration or None."""
    if value is not None and not isinstance(value, Calibration):
        raise CalibrationError(
            f"{asked}: calibration must be statistics, not {told(value)}; recast.calibrate(program, batches) or "
            "recast.Calibration.load(path) gives some, None is for fits without data"
        )


def check_plan(value: Any, asked: str) -> None:
    """Raise PlanError unless a value is a plan."""
    if not isinstance(value, Plan):
        raise PlanError(
            f"{asked}: a plan is needed, not {told(value)}; recast.plan(program, recipe) or recast.Plan.load(path) gives one"
        )


def check_batches(value: Any) -> None:
    """Raise CalibrationError unless a value can be gone through batch by batch."""
    iterable = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    if not iterable or isinstance(value, dict | str | bytes):
        one = "; in a list of one, [batch], it would work" if isinstance(value, dict) else ""
        raise CalibrationError(
            f"calibration: batches must be a list (or whatever else can be gone through) of inputs of the model, not "
            f"{told(value)}{one or '; a list of tensors, tuples or dicts would work'}"
        )
