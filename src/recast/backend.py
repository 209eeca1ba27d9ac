"""The `torch.compile` backend: ``torch.compile(model, backend="recast", options={"recipe": "int8"})``."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from recast.lowering.inductor.compile import compile_graph
from recast.lowering.inductor.kernels import choice
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.modules.apply import is_module, names_of
from recast.passes.plan import Plan, check_coverage, plan
from recast.passes.recipe import Recipe
from recast.passes.report import Report
from recast.passes.rewrite import rewrite
from recast.patterns.capture.dynamo import Captured, from_dynamo
from recast.patterns.errors import RecipeError, nearest
from recast.patterns.find import coverage
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program

__all__ = ["Options", "recast", "reports", "reset"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the backend.

    Parameters
    ----------
    recipe
        As for `recast.plan`: a form's text, a path to a YAML file, a dict, or a `Recipe`.
    plan
        A `Plan`, or a path to one, instead of a recipe. Its site names are those of the model; each graph takes what
        concerns it.
    calibration
        A `Calibration` or a path to one, gathered through `recast.capture` on the same model.
    min_coverage
        Least share of the matrix parameters of each graph that must be matched, else compilation fails with the misses.
    release_dense
        Free the memory of rewritten weights that nothing else in the graph reads. The model then runs compiled only.
    verify
        Run every graph before and after each pass on random inputs.
    freezing
        Let Inductor take the weights as constants and lay them out for the machine's matrix library. They must not be
        changed afterwards.
    inductor
        Further Inductor options, as ``torch.compile(options=...)`` takes them.
    keep_dense, accuracy_level
        As for ``recast.lower(..., target="inductor")``: packed weights written out as well, for many tokens; and 4 for few tokens that
        are rounded to bytes before they meet packed integers.
    """

    recipe: Any = "int8"
    plan: Any = None
    calibration: Any = None
    min_coverage: float = 0.0
    release_dense: bool = False
    verify: bool = False
    freezing: bool = False
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_dense: bool = False
    accuracy_level: int = 0

    @staticmethod
    def of(given: dict[str, Any] | None) -> Options:
        """Options from the dict that `torch.compile` passes on; raises RecipeError for an unknown one."""
        known = {f.name for f in dataclasses.fields(Options)}
        for name in given or {}:
            if name not in known:
                raise RecipeError(f"backend: there is no option '{name}'; {nearest(name, known)}")
        options = Options(**(given or {}))
        least: Any = options.min_coverage
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            raise RecipeError(f"backend: min_coverage is {least!r}; a share from 0 to 1 would work")
        if options.accuracy_level not in (0, 4):
            raise RecipeError(
                f"backend: accuracy_level is {options.accuracy_level!r}; 0 (exact) or 4 (int8 activations) would work"
            )
        return options


_CACHE: OperatorCache | None = None
_LOCK = threading.Lock()
_REPORTS: list[Report] = []


def reports() -> list[Report]:
    """Reports of the graphs compiled in this process since the last `reset`, oldest first."""
    return list(_REPORTS)


def reset() -> None:
    """Forget fitted operators held in memory (those on disk stay) and the reports."""
    global _CACHE  # noqa: PLW0603
    with _LOCK:
        _CACHE = None
        _REPORTS.clear()


def _cache() -> OperatorCache:
    global _CACHE  # noqa: PLW0603
    if _CACHE is None:
        _CACHE = OperatorCache.default()
    return _CACHE


def recast(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Rewrite one graph and compile it with Inductor; registered as the ``recast`` backend of `torch.compile`.

    Parameters
    ----------
    gm, example_inputs
        From dynamo.
    options
        See `Options`.

    Raises
    ------
    CoverageError
        Fewer parameters were matched than ``min_coverage`` asks for.
    PlanError
        The model is in training mode and the recipe is lossy.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    >>> compiled = torch.compile(model, backend="recast", options={"recipe": "int8"})
    """
    asked = Options.of(options)
    captured = from_dynamo(gm, example_inputs)
    captured.program.notes += _breaks(gm)
    with _LOCK, _disable_current_modes(), torch.no_grad():
        rewritten = _rewrite(captured.program, asked)
    kept = [example_inputs[position] for position in captured.kept]
    choose = choice(frozen=False, keep_dense=asked.keep_dense, rounded=asked.accuracy_level == 4)
    compiled, kernels = compile_graph(rewritten, kept, choose, freezing=asked.freezing, options=asked.inductor)
    if asked.release_dense:
        _release(captured, rewritten)
    _REPORTS.append(rewritten.report.on("inductor", kernels))
    positions = captured.kept

    def call(*args: Any) -> Any:
        return compiled(*[args[position] for position in positions])

    return call


def _breaks(gm: fx.GraphModule) -> list[str]:
    """Why the graph ends where it does, if the model goes on: what follows is another graph, or runs as it is."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    first = next((line.strip() for line in str(reason.reason).splitlines() if line.strip()), "no reason given")
    stack = list(reason.user_stack or [])
    where = f" at {stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else ""
    note = f"the graph ends at a break{where}: {first}; matrices multiplied outside of graphs stay as they are"
    if any(frame.filename.endswith("transformers/integrations/moe.py") for frame in stack):
        note += (
            "; experts in a loop cannot be traced: recast.compile(model, recipe) switches them for each call, "
            "model.set_experts_implementation('grouped_mm') for good"
        )
    return [note]


def _rewrite(program: Program, asked: Options) -> Program:
    recipe = Recipe.of(asked.recipe)
    least = max(asked.min_coverage, recipe.min_coverage)
    calibration = _calibration(asked.calibration, program)
    if asked.plan is None:
        wanted = dataclasses.replace(recipe, min_coverage=least)
        decided = plan(program, wanted, calibration, cache=_cache(), progress=False)
    else:
        covered = coverage(program)
        check_coverage(covered.fraction, least, covered)
        whole = asked.plan if isinstance(asked.plan, Plan) else Plan.load(asked.plan)
        decided = _part_of(whole, program)
        decided.calibration = calibration
    return rewrite(
        program,
        decided,
        cache=_cache(),
        verification=asked.verify,
        progress=False,
        pictures=False,
        measure=asked.verify,
    )


def _calibration(given: Any, program: Program) -> Calibration | None:
    if given is None:
        return None
    whole = given if isinstance(given, Calibration) else Calibration.load(given)
    return whole.restrict(program)


def _part_of(whole: Plan, program: Program) -> Plan:
    """What a plan for the whole model says about one of its graphs."""
    sites, _ = find_linear(program)
    names = {s.name for s in sites} | {f"{s.name}.{p.name}" for s in sites for p in s.parts}
    if any(map(is_module, whole.entries.values())):
        names |= set(names_of(program))
    entries = {name: entry for name, entry in whole.entries.items() if name in names}
    return dataclasses.replace(whole, fingerprint="", entries=entries, statistics=None)


def _release(captured: Captured, rewritten: Program) -> None:
    """Free weights that the rewritten graph no longer reads."""
    alive = {tensor.untyped_storage()._cdata for tensor in rewritten.weights.values()}
    for tensor in captured.weights.values():
        if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in alive:
            tensor.untyped_storage().resize_(0)
