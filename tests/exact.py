"""What the tests of exact rewrites share: capture in float64, rewrite, prove equal, and compare with the text on record."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import recast
from recast.passes.simplify import Simplification
from recast.patterns.program import Program
from tests.helpers import assert_close

FOLDER = Path(__file__).resolve().parent / "golden" / "exact"


def randomise(model: nn.Module) -> nn.Module:
    """Float64, eval, no weight at a value where a wrong rewrite would not show (scales of one, biases of zero)."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
                if "var" in name:
                    tensor.abs_().add_(0.1)
    return model


def simplified(model: nn.Module, inputs: Sequence[tuple[Any, ...]], passes: str) -> tuple[Program, Program]:
    """Before and after, proved equal on every input; a second run must change nothing."""
    before = recast.capture(model, inputs[0])
    kept = str(before)
    after = recast.simplify(before, passes)
    assert str(before) == kept, "the program given was changed"
    for given in inputs:
        with torch.no_grad():
            wanted, found = model(*given), after(*given)
        for a, b in zip(*(v if isinstance(v, tuple | list) else (v,) for v in (found, wanted)), strict=True):
            assert isinstance(a, Tensor)
            # Up to sixty four rounding steps of sums of at most 64 terms.
            assert_close(a, b, terms=64 * 64)
    again = recast.simplify(after, passes)
    assert str(again) == str(after), "a second run changed the program"
    fresh = [s for s in steps(again)[len(steps(after)) :] if not s.name.startswith("raise_")]
    assert not [text for step in fresh for text in step.note.done]
    return before, after


def steps(program: Program) -> Sequence[Any]:
    assert isinstance(program.rewrites, Simplification)
    return program.rewrites.steps


def done(program: Program) -> list[str]:
    return [text for step in steps(program) for text in step.note.done]


def reasons(program: Program) -> str:
    return "\n".join(f"{m.name}: {m.reason}" for step in steps(program) for m in step.note.refused)


def golden(name: str, before: Program, after: Program, accept: bool) -> None:
    """Hold a rewrite to the text on record, or write that down."""
    told = "".join(f"  {line}\n" for line in str(after.rewrites).splitlines())
    made = "".join(f"  {new} = {how}\n" for new, how in after.derived.items())
    text = f"before\n{before}\npasses\n{told}\nafter\n{after}\nweights\n{made}"
    path = FOLDER / f"{name}.txt"
    if accept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"there is no {path.name}; run pytest --accept"
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; see what changed, or run pytest --accept"
