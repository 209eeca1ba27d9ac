"""What several test files use."""

import math

import torch
from torch import Tensor

_FLOAT32 = torch.finfo(torch.float32).eps


def assert_close(actual: Tensor, expected: Tensor, *, terms: int = 1, factor: float = 8.0) -> None:
    """Assert that two tensors agree to rounding, given how many terms each of their values is a sum of.

    Rounding errors of a sum of `terms` products grow like a random walk: eps · √terms, relative to the size of what is
    added, for which the largest expected value stands. Sums of coarser numbers than float32 are added up in float32, so there
    the numbers are rounded a few times only, whatever the terms: eps of the coarser of the two dtypes counts once. A bound
    that zeros would pass is refused.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    floating = [t.dtype for t in (actual, expected) if t.dtype.is_floating_point]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    a, b = actual.detach().double(), expected.detach().double()
    assert bool(torch.isfinite(a).all()), "values that are not finite"
    if a.numel() == 0:
        return
    once = eps if eps > _FLOAT32 else 0.0
    relative = factor * (once + min(eps, _FLOAT32) * math.sqrt(max(1, terms)))
    assert relative < 0.5, (
        f"a bound of {relative:.2g} of the largest value shows nothing: {terms} terms, factor {factor}"
    )
    tolerance = relative * float(b.abs().max())
    gap = float((a - b).abs().max())
    where = int((a - b).abs().argmax())
    assert gap <= tolerance, (
        f"largest difference {gap:.3g} exceeds {tolerance:.3g} (eps {eps:.2g}, {terms} terms) "
        f"at flat index {where}: {a.flatten()[where]:.8g}, expected {b.flatten()[where]:.8g}"
    )
