"""Fitting by gradients, for expressions that no closed form solves."""

from __future__ import annotations

import torch

from recast.passes.forms.form import data_error
from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats

__all__ = ["refine"]

# Steps cost a product with the dense matrix and one with the Gram matrix; large weights get fewer of them.
_WORK = 4e11


def refine(
    operator: Operator, weight: torch.Tensor, stats: Stats | None, *, steps: int = 100, rate: float = 0.02
) -> Operator:
    """Lower ``‖(W - Ŵ)X‖`` by Adam over every floating tensor of an operator; never worse than what came in.

    Parameters
    ----------
    operator
        Where to begin. Codes and orders, which are whole numbers, stay as they are.
    weight
        (m, n), what the operator stands for.
    stats
        Of its inputs, or None for ``‖W - Ŵ‖``.
    steps, rate
        How many at most, and how far each goes at first, in units of the root mean square of each tensor. It falls
        linearly to nothing.

    Examples
    --------
    >>> from recast.passes.forms import Form, relative_error
    >>> weight = torch.eye(4) + 0.5
    >>> rough = Form.parse("block_diagonal(2)").fit(torch.eye(4))
    >>> relative_error(weight, refine(rough, weight, None))[0] < relative_error(weight, rough)[0]
    True
    """
    m, n = weight.shape
    gram = None if stats is None or stats.gram is None else stats.gram.to(weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    steps = min(steps, int(_WORK / (4 * m * n * (n if gram is not None else max(m, n)))))
    begun = operator.to(wide)
    held = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in begun.tensors().items()
        if tensor.is_floating_point() and tensor.dtype == wide
    }
    if steps < 1 or not held:
        return operator
    target = weight.detach().to(wide)
    metric = None if gram is None else gram.to(wide)
    size = float(target.square().sum() if metric is None else (target @ metric * target).sum())
    # Below rounding there is nothing left to gain but noise.
    if not size > 0 or data_error(weight, operator, stats) <= size * (4 * torch.finfo(weight.dtype).eps) ** 2:
        return operator
    # Without a scale of its own a tensor of zeros could not begin to move.
    groups = [{"params": [t], "lr": rate * (float(t.detach().square().mean().sqrt()) or 1e-3)} for t in held.values()]
    optimizer = torch.optim.Adam(groups)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    best, least = None, float("inf")
    for step in range(steps + 1):
        with torch.enable_grad():
            moved = begun.with_tensors({**begun.tensors(), **held})
            gap = target - moved.to_dense()
            loss = (gap.square().sum() if metric is None else (gap @ metric * gap).sum()) / size
            if step < steps:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
        reached = float(loss.detach())
        if reached < least:
            best, least = {name: t.detach().clone() for name, t in held.items()}, reached
        if step < steps:
            for group, first in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = first * (1 - step / steps)
            optimizer.step()
    if best is None:
        return operator
    found = begun.with_tensors({**begun.tensors(), **best}).to(weight.dtype)
    return min((operator, found), key=lambda each: data_error(weight, each, stats))
