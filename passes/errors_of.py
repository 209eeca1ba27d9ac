"""Predicted and measured errors of an operator at a site."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recast.passes.forms.algebra import Product, Sum
from recast.passes.forms.gated import Gated, gates
from recast.passes.forms.operator import Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.rounded_inputs import RoundedInputs
from recast.passes.forms.sparse import Sparse
from recast.passes.forms.stats import Stats, relative_error

__all__ = ["measured_errors", "predicted_errors", "rounding_of", "rounds"]


def predicted_errors(weight: Tensor, operator: Operator, stats: Stats | None) -> tuple[float, float | None]:
    """Relative error of the weight, and of the site's output on the calibration data, before anything runs.

    The second is ``|(W - W')X| / |WX|`` from the Gram matrix. Where the operator also rounds its input to ``b`` levels a token
    (dynamic quantization), the rounding adds ``step^2 / 12`` a feature, uniform and independent, with the step estimated from
    the sample kept by calibration; rounding to a float format adds what it does on the sample. What meets a rounding inside a
    product or a sum is counted too.

    Where inputs are left out token by token (`Gated`), the Gram matrix does not tell what that does: the error is the measured
    one, on the sample. Without a sample it is what independent normal inputs would lose, of the sizes that the Gram matrix has;
    without a Gram matrix, of equal sizes, which is given even without statistics.
    """
    weight_error, output_error = relative_error(weight, operator, stats)
    if gates(operator):
        measured = measured_errors(weight, operator, stats)
        if measured is not None:
            return weight_error, measured
        if output_error is None or stats is None:
            stats = Stats.from_gram(torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device))
            output_error = weight_error
    if output_error is None or stats is None:
        return weight_error, output_error
    noise = _noise(operator, stats, None)
    if noise and stats.gram is not None:
        size = float(((weight.double() @ stats.gram) * weight.double()).sum())
        output_error = math.sqrt(output_error**2 + noise / max(size, 1e-300))
    return weight_error, output_error


def _noise(operator: Operator, stats: Stats, after: Tensor | None) -> float:
    """Squared error of the output that rounding inputs, or leaving some out, adds in an operator.

    `after` is what its own output meets.
    """
    if not (rounds(operator) or gates(operator)):
        return 0.0
    if isinstance(operator, Gated):
        return operator.dropped(stats, after) + _noise(operator.weight, stats, after)
    if isinstance(operator, RoundedInputs):
        return operator.lost(stats, after) + _noise(operator.weight, stats, after)
    if isinstance(operator, Quantized):
        if stats.sample is None:
            return 0.0
        sample = stats.sample.double()
        if operator.static:  # beyond the grid inputs are cut off, which no step tells
            dense = operator.to_dense().double()
            gap = (operator.rounded_inputs(sample) - sample) @ (dense if after is None else after @ dense).T
            return float(gap.square().sum()) / max(1, len(sample)) * stats.tokens
        over = (1,) if operator.per_token else (0, 1)
        step = (sample.amax(over).clamp_min(0) - sample.amin(over).clamp_max(0)) / 255
        dense = operator.to_dense().double()
        reached = dense if after is None else after @ dense
        return float(step.square().mean()) / 12 * stats.tokens * float(reached.square().sum())
    if isinstance(operator, Product):
        noise = 0.0
        if rounds(operator.right) or gates(operator.right):
            left = operator.left.to_dense().double()
            noise += _noise(operator.right, stats, left if after is None else after @ left)
        if rounds(operator.left) or gates(operator.left):
            noise += _noise(operator.left, stats.through(operator.right), after)
        return noise
    if isinstance(operator, Sum):
        return sum(_noise(part, stats, after) for part in operator.parts)
    if isinstance(operator, Sparse):
        seen = operator.seen_by_values(stats)
        return 0.0 if seen is None else _noise(operator.values, seen, after)
    return 0.0


def rounds(operator: Operator) -> bool:
    """Whether anything in an operator rounds activations."""
    if isinstance(operator, RoundedInputs):
        return True
    if isinstance(operator, Quantized):
        return operator.activations
    return any(rounds(child) for child in operator.children().values())


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
