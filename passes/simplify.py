"""`simplify`: a pipeline of exact rewrites, each verified, with what it did and what it refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from recast.passes.base import Context, Pass, Pipeline, Soundness, discover
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.exact import ExactPass, Note
from recast.passes.failure import verify
from recast.passes.plan import Plan
from recast.passes.verify import exact_bound
from recast.patterns.errors import PlanError, VerificationError
from recast.patterns.program import Program

__all__ = ["DEFAULT", "Simplification", "Step", "simplify"]

DEFAULT = (
    "common_subexpressions,remove_idle,fold_adapters,fold_batch_norm,fold_norm_scale,fold_scale,drop_softmax_constant,"
    "multiply_adjacent,merge_linears"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one pass did.

    Parameters
    ----------
    name
        Of the pass, with its options.
    algebra
        The identity it rests on.
    note
        What was done and what was refused.
    checked
        What verification found.
    """

    name: str
    algebra: str
    note: Note
    checked: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"name": self.name, "algebra": self.algebra, **self.note.to_dict(), "checked": self.checked}

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.note.done)} done, {len(self.note.refused)} refused"]
        lines += [f"  {text}" for text in self.note.done]
        lines += [f"  not {m.name}: {m.reason}{f' ({m.where})' if m.where else ''}" for m in self.note.refused]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Simplification:
    """What a pipeline of exact rewrites did, pass by pass."""

    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"steps": [step.to_dict() for step in self.steps]}

    def __str__(self) -> str:
        return "\n".join(str(step) for step in self.steps)


def simplify(
    program: Program,
    passes: str | Pipeline = DEFAULT,
    *,
    verification: bool = True,
    calibration: Calibration | None = None,
) -> Program:
    """Rewrite a program exactly: the same function, computed with less.

    Parameters
    ----------
    program
        It is not changed.
    passes
        Exact passes in order, as text or as a pipeline; several are gone through again until none finds anything to do.
    verification
        Check structure, metadata, interface, ownership and numbers after every pass, and every formula of a new weight at
        the end.
    calibration
        Its first batch is what the numbers are checked on; random inputs without one.

    Returns
    -------
    Program
        Its ``rewrites`` says what each pass did and refused, its ``derived`` what each new weight is made of.

    Raises
    ------
    PlanError
        A pass is unknown, or is not exact.
    VerificationError
        A pass broke something.

    Examples
    --------
    >>> import torch, recast
    >>> class Gated(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.up = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
    ...
    ...     def forward(self, x):
    ...         return torch.sigmoid(self.gate(x)) * self.up(x)
    >>> program = recast.simplify(recast.capture(Gated().eval(), (torch.randn(3, 8),)), "merge_linears")
    >>> print(program.rewrites)
    merge_linears: 1 done, 0 refused
      gate + up -> gate_up
    >>> str(program.derived["gate_up.weight"])
    'cat(gate.weight, up.weight)'
    """
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline.parse(passes)
    for step in pipeline.passes:
        if step.soundness is not Soundness.EXACT:
            raise PlanError(
                f"simplify: '{step.name}' is {step.soundness.value}, only exact passes may run here; "
                f"known: {', '.join(exact_passes())}"
            )
    pipeline.check()
    context = Context(Plan(program.fingerprint(), {}), calibration, OperatorCache(None), progress=False)
    current, done = program, list[Step]()
    # A pass may make room for one before it: round after round, until nothing changes or passes undo each other, which shows in
    # what a round tells. A single pass has nothing left to do by itself, and passes that are said to undo each other run once.
    names = {step.name for step in pipeline.passes}
    once = len(pipeline.passes) == 1 or any(names.intersection(step.undoes) for step in pipeline.passes)
    seen: list[list[tuple[str, list[str]]]] = []
    while True:
        following, taken = current, list[Step]()
        for step in pipeline.passes:
            following, told = _run(step, program, following, [*done, *taken], context, verification)
            if not seen or told.note.done:
                taken.append(told)
        story = [(step.name, step.note.done) for step in taken if step.note.done]
        if story in seen:
            break
        seen.append(story)
        done += taken
        if following is current or once:
            current = following
            break
        current = following
    if current is program:
        current = program.copy()
    if verification:
        check_formulas(program, current)
    before = program.rewrites.steps if isinstance(program.rewrites, Simplification) else ()
    current.rewrites = Simplification((*before, *done))
    return current


def _run(
    step: Pass, program: Program, current: Program, done: list[Step], context: Context, verification: bool
) -> tuple[Program, Step]:
    """What a pass makes of the current program, which it stays if nothing changed, and what is told of it."""
    following = step.run(current, context)
    note = context.notes.get(str(step), context.notes.get(step.name))
    note = note if isinstance(note, Note) else Note([str(note)] if note else [])
    again = any(taken.name == str(step) for taken in done)
    if again and not isinstance(step, ExactPass) and str(following) == str(current):
        note.done.clear()  # it tells in words that there was nothing to do
    checked: dict[str, Any] = {"verified": False}
    if not note.done and (again or isinstance(step, ExactPass)):
        checked, following = {"verified": verification, "unchanged": True}, current
    elif verification:
        checked = verify(program, current, following, step, [s.name for s in done], context)
    told = {(miss.name, miss.reason) for taken in done if taken.name == str(step) for miss in taken.note.refused}
    note = Note(note.done, [miss for miss in note.refused if (miss.name, miss.reason) not in told])
    return following, Step(str(step), (type(step).__doc__ or "").strip().splitlines()[0], note, checked)


def exact_passes() -> dict[str, type[Pass]]:
    """Every exact rewrite that is found, by name.

    Examples
    --------
    >>> "merge_linears" in exact_passes()
    True
    """
    discover()
    return {name: kind for name, kind in sorted(Pass.known.items()) if issubclass(kind, ExactPass)}


def check_formulas(original: Program, program: Program) -> None:
    """Compute every derived weight from the original ones and compare.

    Parameters
    ----------
    original
        Holds the weights that formulas speak of, as far as it is not made of others itself.
    program
        Made of it by exact passes.

    Raises
    ------
    VerificationError
        A weight is not what its formula says.
    """
    weights = {name: weight for name, weight in original.weights.items() if name not in original.derived}
    held = program.weights
    for name, formula in program.derived.items():
        if not all(source in weights for source in formula.sources):
            continue  # made before `original` was, and checked then
        found, wanted = held[name].detach().double(), formula.value(weights).double()
        # Each pass on the way rounds once to the weight's dtype; no more than ten make one weight.
        slack = 10 * torch.finfo(held[name].dtype).eps * float(wanted.abs().max()) if wanted.numel() else 0.0
        gap = float((found - wanted).abs().max()) if found.shape == wanted.shape and found.numel() else 0.0
        if found.shape != wanted.shape or gap > max(slack, exact_bound(held[name].dtype) * 1e-3):
            raise VerificationError(
                f"weight '{name}' differs by {gap:.3g} from its formula {formula}; {slack:.3g} is rounding"
            )
