"""What several test files use."""

import math

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, *, terms: int = 1, factor: float = 8.0) -> None:
    """Assert that two tensors agree to rounding, given how many terms each of their values is a sum of.

    Rounding errors of a sum of `terms` products grow like a random walk: eps · √terms, relative to the size of what is
    added, for which the largest expected value stands. eps is that of the coarser of the two dtypes.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    floating = [t.dtype for t in (actual, expected) if t.dtype.is_floating_point]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    a, b = actual.detach().double(), expected.detach().double()
    assert bool(torch.isfinite(a).all()), "values that are not finite"
    if a.numel() == 0:
        return
    tolerance = factor * eps * math.sqrt(max(1, terms)) * float(b.abs().max())
    gap = float((a - b).abs().max())
    where = int((a - b).abs().argmax())
    assert gap <= tolerance, (
        f"largest difference {gap:.3g} exceeds {tolerance:.3g} (eps {eps:.2g}, {terms} terms) "
        f"at flat index {where}: {a.flatten()[where]:.8g}, expected {b.flatten()[where]:.8g}"
    )
