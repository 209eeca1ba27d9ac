"""Decisions that depend on values: made as the model makes them on the example, and checked whenever the program runs.

``if mask.any():`` has no answer while tracing, where tensors hold no values. The model is run on the example first, what it
asked its tensors is noted by the place that asked, and the tracer is given those answers. Each leaves a check in the graph, so
a program never goes on with values that would have led elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["decisions"]

_TRUTH = {Tensor.__bool__, torch.is_nonzero, Tensor.is_nonzero}
_PAIRS = {torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, Tensor.__contains__}
_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__index__}
_TOLD = "captured with branches that depend on values taken as the example takes them; other values are refused"
_LONGEST = 4096  # numbers read at once; more is data, not a decision
_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__)))

_Place = tuple[str, int, str]


@contextlib.contextmanager
def decisions(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, numbers: bool = False
) -> Iterator[list[str]]:
    """Answer what a model asks of values while it is traced as it was answered when it ran on the example.

    Parameters
    ----------
    model
        Run once, eagerly; its buffers and the random state are what they were afterwards.
    args, kwargs
        The example.
    numbers
        Whether numbers read from tensors are taken over too (`.item()`, `.tolist()`). Otherwise they stay open, and only
        truth values are taken over.

    Yields
    ------
    list of str
        What was done, filled in as it is done.
    """
    noted: dict[_Place, list[Any]] = {}
    with _untouched(model), torch.no_grad(), _Noting(noted):
        model(*_copies(args), **_copies(kwargs))
    said: list[str] = []
    with _Answering(noted, said, numbers):
        yield said


def _copies(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers and the random state as they were."""
    before = {id(b): (b, b.detach().clone()) for b in model.buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before.values():
                    if buffer.shape == value.shape and not torch.equal(buffer, value):
                        buffer.copy_(value)


class _Asked(TorchFunctionMode):
    """Sees what Python asks of a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[_Place] = Counter()

    def place(self, func: Any) -> tuple[_Place, int]:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno, str(getattr(func, "__name__", func)))
        self.count[place] += 1
        return place, self.count[place] - 1


class _Noting(_Asked):
    def __init__(self, noted: dict[_Place, list[Any]]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func in _TRUTH or func in _PAIRS or func in _NUMBERS:
            place, _ = self.place(func)
            self.noted.setdefault(place, []).append(answer)
        return answer


class _Answering(_Asked):
    def __init__(self, noted: dict[_Place, list[Any]], said: list[str], numbers: bool) -> None:
        super().__init__()
        self.noted = noted
        self.said = said
        self.numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (func in _TRUTH or func in _PAIRS or func in _NUMBERS):
            return func(*args, **kwargs)
        place, position = self.place(func)
        answers = self.noted.get(place, [])
        if position >= len(answers) or not self._taken_over(func, args[0], answers[position]):
            return func(*args, **kwargs)
        answer = answers[position]
        file, line, _ = place
        told = f"the program was captured for {answer!r} as the answer at {Path(file).name}:{line}; these values give another"
        torch._assert_async(_holds(func, args, kwargs, answer), told[:300])
        self.said[:] = [_TOLD]
        return answer

    def _taken_over(self, func: Any, tensor: Any, answer: Any) -> bool:
        if func not in _NUMBERS or (func is Tensor.item and tensor.dtype == torch.bool):
            return True
        leaves = pytree.tree_leaves(answer)
        finite = all(not isinstance(v, float) or math.isfinite(v) for v in leaves)
        return self.numbers and finite and len(leaves) <= _LONGEST


def _holds(func: Any, args: Any, kwargs: Any, answer: Any) -> Tensor:
    """Whether the values at hand give the same answer, as a tensor."""
    first: Tensor = args[0]
    holds: Tensor
    if func is Tensor.tolist:
        return torch.eq(first, torch.tensor(answer, device=first.device)).all()
    if func is Tensor.__contains__:
        holds = torch.eq(first, args[1]).any()
    elif func in (torch.equal, Tensor.equal):
        holds = torch.eq(first, args[1]).all()
    elif func in _PAIRS:
        holds = torch.isclose(*args, **kwargs).all()
    elif isinstance(answer, bool):
        holds = torch.ne(first.reshape(()), 0)
    else:
        value = first.reshape(())
        return torch.eq(value.to(torch.int64) if func is Tensor.__int__ else value, answer)
    return holds if answer else holds.logical_not()
