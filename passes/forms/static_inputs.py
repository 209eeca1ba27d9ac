"""Grids of 256 numbers that inputs are rounded to, chosen from what calibration saw of them."""

from __future__ import annotations

import torch
from torch import Tensor

from recast.passes.forms.stats import Stats
from recast.patterns.errors import CalibrationError

__all__ = ["static_grid"]

# Shares of the whole range that are tried: a few large numbers may be cut off where all others gain more by finer steps.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)


def static_grid(form: str, stats: Stats | None, zero_point: bool = True) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of int8 codes for inputs, ``x = (code - zero) * scale``.

    It depends on the inputs alone: sites that read the same vectors get the same grid, and one rounding serves them all.

    Parameters
    ----------
    form
        Who asks, for messages.
    stats
        Of the inputs.
    zero_point
        False: the grid is symmetric and its zero point 0.

    Returns
    -------
    scale, zero
        (1,), float32 and int8.

    Raises
    ------
    CalibrationError
        There are no statistics, or they hold neither ranges nor a sample.
    """
    if stats is None or (stats.ranges is None and stats.sample is None):
        found = "there are no statistics" if stats is None else "these statistics hold neither ranges nor a sample"
        raise CalibrationError(
            f"{form}: the range of the inputs is needed, {found}; recast.calibrate(program, batches) gathers it, as does "
            "`recast optimize --calibrate`"
        )
    sample = None if stats.sample is None else stats.sample.double()
    seen = stats.ranges.double() if stats.ranges is not None else sample
    assert seen is not None  # one of both is there
    bottom, top = float(seen.amin().clamp_max(0)), float(seen.amax().clamp_min(0))
    grids = [_grid(bottom * share, top * share, zero_point) for share in _SHARES]
    if sample is None or not sample.numel():
        return grids[0]
    errors = [_error(sample, *grid) for grid in grids]
    return grids[errors.index(min(errors))]


def _grid(bottom: float, top: float, zero_point: bool) -> tuple[Tensor, Tensor]:
    tiny = float(torch.finfo(torch.float32).tiny)  # inputs that are all zero have no range
    if not zero_point:
        scale = torch.tensor([max(-bottom, top, tiny) / 127], dtype=torch.float32)
        return scale.clamp_min(tiny), torch.zeros(1, dtype=torch.int8)
    scale = torch.tensor([(top - bottom) / 255], dtype=torch.float32).clamp_min(tiny)
    return scale, torch.round(-128 - bottom / scale).clamp(-128, 127).to(torch.int8)


def _error(sample: Tensor, scale: Tensor, zero: Tensor) -> float:
    """Squared error of rounding, over all of a sample."""
    step, offset = float(scale), float(zero)
    codes = (torch.round(sample / step) + offset).clamp_(-128, 127)
    return float(((codes - offset) * step - sample).square().sum())
