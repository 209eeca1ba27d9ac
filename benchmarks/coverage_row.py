"""One row of the coverage table: capture an architecture, recognise, and hold the result to what the model did."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_table import without_paths
from benchmarks.zoo import load
from recast.patterns.capture.export import capture
from recast.patterns.errors import CaptureError
from recast.patterns.program import Program
from recast.patterns.recognise import recognise

SEED = 0  # before every run: some models draw at random in eval mode too
SHAPES = ((1, 10), (3, 4), (3, 13))  # batch, length; one length is the number of heads


def examine(name: str, sizes: str = "free") -> dict[str, Any]:
    """Everything about one architecture, JSON-able; captured with free sizes, or (``example``) those of the example only."""
    zoo = load()
    from tests.zoo.compare import compare

    family = next((f for f, members in zoo.families().items() if name in members), "other")
    row: dict[str, Any] = {"name": name, "family": family, "seconds": {}}
    try:
        model, args, kwargs = timed(row, "build", lambda: zoo.build(name))
    except zoo.Unbuildable as error:
        return row | {"unbuilt": without_paths(str(error).removeprefix(f"{name}: "))}
    row["class"] = type(model).__name__
    truth, expected = _watched(row, model, args, kwargs)
    if truth is None:
        return row
    row["plain"] = _plain_export(row, model, args, kwargs)
    torch._dynamo.reset()
    shapes = None if sizes == "free" else dict.fromkeys(kwargs)
    row["sizes"] = sizes
    try:
        program = timed(row, "capture", lambda: capture(model, args, kwargs, shapes))
    except CaptureError as error:
        return row | {"captured": False, "capture_error": without_paths(str(error))[:600]} | _nothing(truth)
    row |= {"captured": True, "notes": program.notes, "nodes": len(program.graph.nodes)}
    row["capture_differs"] = _differs(program, expected, args, kwargs)
    found = timed(row, "recognise", lambda: recognise(program))
    row |= compare(truth, program, found)
    row["wrong"], row["wrong_reason"] = _wrong(zoo, model, program, row)
    return row


def compare_again(row: dict[str, Any]) -> dict[str, Any]:
    """A row that was written before raised programs were compared at every size, with that comparison anew."""
    zoo = load()
    model, args, kwargs = zoo.build(row["name"])
    torch._dynamo.reset()
    shapes = None if row["sizes"] == "free" else dict.fromkeys(kwargs)
    program = capture(model, args, kwargs, shapes)
    row["wrong"], row["wrong_reason"] = _wrong(zoo, model, program, row)
    return row


def timed(
    row: dict[str, Any], name: str, work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> Any:
    """Run something and note its seconds."""
    start = clock()
    try:
        return work()
    finally:
        row["seconds"][name] = round(clock() - start, 3)


def _watched(row: dict[str, Any], model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    from tests.zoo.truth import observe

    torch.manual_seed(SEED)
    try:
        truth, result = observe(model, args, kwargs)
    except Exception as error:  # noqa: BLE001  # inputs that the model does not take: no fault of anything here
        row["unbuilt"] = (
            f"does not run on the inputs made for it: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        )
        return None, None
    return truth, result


def _plain_export(row: dict[str, Any], model: nn.Module, args: Any, kwargs: Any) -> bool:
    def export() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(model, args, kwargs, strict=False)

    try:
        timed(row, "plain", export)
    except Exception as error:  # noqa: BLE001  # the failures of torch.export are what is counted
        row["plain_error"] = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
        )
        return False
    return True


def _nothing(truth: Any) -> dict[str, Any]:
    """Counts of an architecture that was not captured: nothing found of what is there."""
    return {
        "matrices": [0, truth.parameters],
        "attention": [0, sum(truth.attention.values())],
        "moe": [0, len(truth.routed)],
        "norms": [0, len(truth.norms)],
    }


def _differs(program: Program, expected: Any, args: Any, kwargs: Any) -> str:
    """How the captured program differs from the model; empty if it does not."""
    from tests.zoo.compare import gap, tensors

    torch.manual_seed(SEED)
    try:
        with torch.no_grad():
            got = program(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # a program that does not run differs
        return f"does not run: {type(error).__name__}: {str(error)[:200]}"
    return gap(
        tensors(got), tensors(expected), exact_count=not any("captured without output" in n for n in program.notes)
    )


def _wrong(zoo: Any, model: nn.Module, program: Program, row: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether a raised program differs from the captured one, and how; None if it was not compared at all.

    At every size of `SHAPES`: with the program at hand where that takes the size, else with one captured for it. What the sizes
    were goes into the row as ``compared``, those at which nothing could be compared as ``not_compared``.
    """
    row["compared"], row["not_compared"], seen = [], {}, set()
    at_hand = _Raised(program)
    for seed, (batch, length) in enumerate(SHAPES):
        args, kwargs = zoo.vary(model, batch, length, seed=seed + 1)
        shapes = str([tuple(t.shape) for t in _leaves((args, kwargs))])
        if shapes in seen:  # a model of images: the length is nothing to it
            continue
        seen.add(shapes)
        size = f"batch {batch}, length {length}"
        try:
            pair = at_hand if at_hand.takes(args, kwargs) else _Raised(_captured_for(row, model, args, kwargs))
            told = pair.differs(args, kwargs)
        except Exception as error:  # noqa: BLE001  # not captured for this size, or the model does not take it
            row["not_compared"][size] = without_paths(f"{type(error).__name__}: {error!s}")[:300]
            continue
        if told:
            return True, f"{size}: {told}"
        row["compared"].append(size)
    if row["compared"]:
        return False, ""
    args, kwargs = zoo.vary(model, 2, 10, seed=9)
    if not at_hand.takes(args, kwargs):
        return None, "not checked: the program takes no other inputs of the example's sizes"
    told = at_hand.differs(args, kwargs)
    row["compared"] = [] if told else ["batch 2, length 10"]
    return bool(told), told


def _captured_for(row: dict[str, Any], model: nn.Module, args: Any, kwargs: Any) -> Program:
    torch._dynamo.reset()
    return timed(row, "compare", lambda: capture(model, args, kwargs, dict.fromkeys(kwargs)))  # type: ignore[no-any-return]


def _leaves(inputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


class _Raised:
    """A captured program and what raising makes of it, made when first asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.raised: Callable[..., Any] | str = ""

    def takes(self, args: Any, kwargs: Any) -> bool:
        """Whether the program runs on these inputs; sizes it was not captured for it refuses."""
        try:
            self._run(self.program, args, kwargs)
        except Exception:  # noqa: BLE001  # captured for other sizes
            return False
        return True

    def differs(self, args: Any, kwargs: Any) -> str:
        """How the raised program differs from the captured one on these inputs; empty if it does not."""
        from recast.passes.rules.raise_structures import raise_program
        from tests.zoo.compare import gap, tensors

        expected = self._run(self.program, args, kwargs)
        try:
            if not self.raised:
                self.raised = raise_program(self.program)
        except Exception as error:  # noqa: BLE001  # raising that fails is wrong
            self.raised = f"raising failed: {type(error).__name__}: {str(error)[:300]}"
        if isinstance(self.raised, str):
            return self.raised
        try:
            got = self._run(self.raised, args, kwargs)
        except Exception as error:  # noqa: BLE001
            return f"does not run: {type(error).__name__}: {str(error)[:300]}"
        return gap(tensors(got), tensors(expected))

    @staticmethod
    def _run(program: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        torch.manual_seed(SEED)
        with torch.no_grad():
            return program(*args, **kwargs)
