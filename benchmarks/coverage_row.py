"""One row of the coverage table: capture an architecture, recognise, and hold the result to what the model did."""

from __future__ import annotations

import importlib
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
    row["wrong"], row["wrong_reason"] = _wrong(zoo, model, program)
    return row


def timed(row: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Run something and note its seconds."""
    start = time.perf_counter()
    try:
        return work()
    finally:
        row["seconds"][name] = round(time.perf_counter() - start, 3)


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


def _wrong(zoo: Any, model: nn.Module, program: Program) -> tuple[bool | None, str]:
    """Whether the raised program differs from the captured one; None if it was not checked, and why."""
    from tests.zoo.compare import gap, tensors

    try:
        module = importlib.import_module("recast.passes.rules.raise_structures")
    except ImportError as error:
        return None, f"not checked: {error}"
    try:
        raised = module.raise_program(program)
    except Exception as error:  # noqa: BLE001  # raising that fails is wrong
        return True, f"raising failed: {type(error).__name__}: {str(error)[:300]}"
    checked = 0
    for seed, (batch, length) in enumerate(SHAPES):
        args, kwargs = zoo.vary(model, batch, length, seed=seed + 1)
        torch.manual_seed(SEED)
        try:
            with torch.no_grad():
                expected = program(*args, **kwargs)
        except Exception:  # noqa: BLE001  # captured for other sizes
            continue
        checked += 1
        torch.manual_seed(SEED)
        try:
            with torch.no_grad():
                got = raised(*args, **kwargs)
        except Exception as error:  # noqa: BLE001
            return True, f"does not run at batch {batch}, length {length}: {type(error).__name__}: {str(error)[:300]}"
        if told := gap(tensors(got), tensors(expected)):
            return True, f"batch {batch}, length {length}: {told}"
    if checked:
        return False, ""
    args, kwargs = zoo.vary(model, 2, 10, seed=9)
    try:
        with torch.no_grad():
            torch.manual_seed(SEED)
            expected = program(*args, **kwargs)
            torch.manual_seed(SEED)
            got = raised(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return None, f"not checked: {type(error).__name__}: {str(error)[:200]}"
    told = gap(tensors(got), tensors(expected))
    return bool(told), told
