"""Sums, means, extremes and orders along axes."""

from __future__ import annotations

import functools
import operator as python
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recast.patterns.capture.onnx.operator import Call, operator
from recast.patterns.capture.onnx.values import Known, Value, largest, smallest


def _reduction(
    name: str, on: Callable[[Tensor, list[int], bool], Tensor], numbers: Callable[..., Any] | None = None
) -> None:
    @operator(name)
    def run(call: Call) -> Value:
        value, axes, keep = call[0], call.axes(), bool(call.attribute("keepdims", 1))
        if axes is None and call.attribute("noop_with_empty_axes", 0):
            return value
        if isinstance(value, Known):
            if numbers is not None and value.values.ndim == 1 and value.values.size:
                total = functools.reduce(numbers, value.list())
                return Known.of([total] if keep else total, value.dtype)
            value = value.tensor()
        return on(value, list(range(value.ndim)) if axes is None else axes, keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


_reduction("ReduceMean", lambda x, axes, keep: x.mean(axes, keepdim=keep))
_reduction("ReduceSum", _total, python.add)
_reduction("ReduceMax", lambda x, axes, keep: x.amax(axes, keepdim=keep), largest)
_reduction("ReduceMin", lambda x, axes, keep: x.amin(axes, keepdim=keep), smallest)
_reduction("ReduceProd", _product, python.mul)
_reduction("ReduceL1", lambda x, axes, keep: _total(x.abs(), axes, keep))
_reduction("ReduceL2", lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep))
_reduction("ReduceSumSquare", lambda x, axes, keep: _total(x * x, axes, keep))
_reduction("ReduceLogSum", lambda x, axes, keep: _total(x, axes, keep).log())
_reduction("ReduceLogSumExp", torch.logsumexp)


@operator("ArgMax", "ArgMin")
def extreme(call: Call) -> Value:
    """Where the largest or smallest lies."""
    call.refuse(select_last_index=0)
    run = torch.argmax if call.node.type == "ArgMax" else torch.argmin
    return run(call.tensor(0), call.attribute("axis", 0), keepdim=bool(call.attribute("keepdims", 1)))


@operator("TopK")
def top(call: Call) -> list[Value]:
    """The largest or smallest few, and where they lie."""
    k = call.known(1).number
    largest, ordered = bool(call.attribute("largest", 1)), bool(call.attribute("sorted", 1))
    return list(torch.topk(call.tensor(0), k, call.attribute("axis", -1), largest, ordered))


@operator("CumSum")
def running_sum(call: Call) -> Value:
    """Sums from the start of an axis."""
    call.refuse(exclusive=0, reverse=0)
    x = call.tensor(0)
    return torch.cumsum(x, call.known(1).number, dtype=x.dtype)


@operator("NonZero")
def non_zero(call: Call) -> Value:
    """Indices of what is not zero, a row a dimension."""
    return torch.nonzero(call.tensor(0)).transpose(0, 1)
