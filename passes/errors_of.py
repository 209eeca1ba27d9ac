"""Predicted and measured errors of an operator at a site."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats, relative_error

__all__ = ["activation_steps", "measured_errors", "predicted_errors"]


def predicted_errors(weight: Tensor, operator: Operator, stats: Stats | None) -> tuple[float, float | None]:
    """Relative error of the weight, and of the site's output on the calibration data, before anything runs.

    The second is ``|(W - W')X| / |WX|`` from the Gram matrix. Where the operator also rounds its input to ``b`` levels a token
    (dynamic quantization), the rounding adds ``step^2 / 12`` a feature, uniform and independent, with the step of each token
    estimated from the sample kept by calibration.
    """
    weight_error, output_error = relative_error(weight, operator, stats)
    if output_error is None or stats is None:
        return weight_error, output_error
    steps = activation_steps(operator)
    if steps and stats.sample is not None and stats.gram is not None:
        top = stats.sample.double().abs().amax(1)
        noise = float((top / steps).square().mean()) / 12 * stats.tokens
        size = float(((weight.double() @ stats.gram) * weight.double()).sum())
        added = noise * float(operator.to_dense().double().square().sum()) / max(size, 1e-300)
        output_error = math.sqrt(output_error**2 + added)
    return weight_error, output_error


def activation_steps(operator: Operator) -> int:
    """Levels on one side of zero that an operator rounds its input to; 0 if it does not."""
    if getattr(operator, "activations", False):
        return 127
    inner = operator.children()
    right = inner.get("right")
    return activation_steps(right) if right is not None else 0


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
