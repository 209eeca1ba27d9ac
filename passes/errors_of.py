"""Predicted and measured errors of an operator at a site."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.stats import Stats, relative_error

__all__ = ["measured_errors", "predicted_errors", "rounding_of"]


def predicted_errors(weight: Tensor, operator: Operator, stats: Stats | None) -> tuple[float, float | None]:
    """Relative error of the weight, and of the site's output on the calibration data, before anything runs.

    The second is ``|(W - W')X| / |WX|`` from the Gram matrix. Where the operator also rounds its input to ``b`` levels a token
    (dynamic quantization), the rounding adds ``step^2 / 12`` a feature, uniform and independent, with the step
    estimated from the sample kept by calibration.
    """
    weight_error, output_error = relative_error(weight, operator, stats)
    if output_error is None or stats is None:
        return weight_error, output_error
    mode = rounding_of(operator)
    if mode is not None and stats.sample is not None and stats.gram is not None:
        sample = stats.sample.double()
        over = (1,) if mode == "token" else (0, 1)
        step = (sample.amax(over).clamp_min(0) - sample.amin(over).clamp_max(0)) / 255
        noise = float(step.square().mean()) / 12 * stats.tokens
        size = float(((weight.double() @ stats.gram) * weight.double()).sum())
        added = noise * float(operator.to_dense().double().square().sum()) / max(size, 1e-300)
        output_error = math.sqrt(output_error**2 + added)
    return weight_error, output_error


def rounding_of(operator: Operator) -> str | None:
    """How an operator rounds its own input to eight bits: ``token``, ``tensor``, or None if it does not."""
    if isinstance(operator, Quantized):
        return None if not operator.activations else "token" if operator.per_token else "tensor"
    right = operator.children().get("right")
    return rounding_of(right) if right is not None else None


def measured_errors(weight: Tensor, operator: Operator, stats: Stats | None) -> float | None:
    """Relative error of the site's output on the calibration sample, running the operator as it will run.

    The reference is the dense weight in float64.
    """
    if stats is None or stats.sample is None:
        return None
    with torch.no_grad():
        sample = stats.sample.to(operator.dtype)
        reference = sample.double() @ weight.double().T
        found = operator.apply(sample).double()
    size = float(reference.square().sum())
    gap = float((found - reference).square().sum())
    return math.sqrt(gap / size) if size > 0 else (0.0 if gap == 0 else math.inf)
