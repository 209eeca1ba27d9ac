"""One row of the ONNX table: an architecture through torch's exporter, and through recast dense and in 8 bits."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import recast
from benchmarks.coverage_row import SEED, timed
from benchmarks.coverage_table import without_paths
from benchmarks.coverage_work import Row, Tell
from benchmarks.zoo import load
from recast.lowering.artifact import Artifact
from recast.lowering.onnx.session import load_session
from recast.passes.cache import OperatorCache
from recast.patterns.errors import RecastError
from recast.patterns.program import Program

RECIPES = {"dense": 1e-4, "int8": 1e-2}  # largest difference, relative to the largest value of a result
SHAPES = ((3, 4), (3, 13))  # batch, length: the first of them that the program takes, beside the example
Runs = Callable[..., Any]
Sample = tuple[tuple[Any, ...], dict[str, Any]]


class Late(BaseException):
    """A stage took more than its share of a row's time. No `Exception`: nothing on the way is to handle it."""


def examine(name: str, tell: Tell, sizes: str = "free", limit: float = 60.0) -> Row:
    """Everything about one architecture, JSON-able.

    Parameters
    ----------
    sizes
        ``free``: capture for any batch and length, and for the example's alone where that does not go; ``example``: the latter.
    limit
        Processor seconds for the row; torch's exporter and the capture with free sizes get a third each.
    """
    zoo = load()
    family = next((f for f, members in zoo.families().items() if name in members), "other")
    row: Row = {"name": name, "family": family, "seconds": {}}
    try:
        model, args, kwargs = timed(row, "build", lambda: zoo.build(name), time.process_time)
        expected = _run(model, (args, kwargs))
    except zoo.Unbuildable as error:
        return row | {"unbuilt": without_paths(str(error).removeprefix(f"{name}: "))}
    except Exception as error:  # noqa: BLE001  # inputs that the model does not take: no fault of anything here
        return row | {"unbuilt": f"does not run on the inputs made for it: {reason(error)}"}
    row["class"] = type(model).__name__
    row["draws"] = bool(difference(tensors(_run(model, (args, kwargs), SEED + 1)), tensors(expected))[0])
    tell(row)
    row["torch"] = _by_torch(row, model, (args, kwargs), expected, limit / 3)
    tell(row)
    if sizes == "free":
        try:
            with at_most(limit / 3, "free sizes"):
                rest = _by_recast(row, zoo, model, (args, kwargs), None, tell)
        except (RecastError, Late) as error:
            row["free_error"] = reason(error)
            sizes = "example"
    if sizes == "example":
        try:
            rest = _by_recast(row, zoo, model, (args, kwargs), dict.fromkeys(kwargs), tell)
        except RecastError as error:
            return row | {"captured": False, "capture_error": reason(error)}
    rest()
    return row


def _by_torch(row: Row, model: nn.Module, sample: Sample, expected: Any, limit: float) -> Row:
    """What ``torch.onnx.export(model, dynamo=True)`` makes of a model, and whether ONNX Runtime computes the same with it."""
    torch._dynamo.reset()

    def export() -> Any:
        with torch.no_grad(), warnings.catch_warnings(), at_most(limit, "torch.onnx.export"):
            warnings.simplefilter("ignore")  # and whole graphs are printed where something fails
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return torch.onnx.export(model, sample[0], kwargs=sample[1], dynamo=True, verbose=False)

    try:
        made = timed(row, "torch", export, time.process_time)
    except (Exception, Late) as error:  # noqa: BLE001  # whatever it raises, that is counted
        return {"exported": False, "error": torch_reason(error)}
    found: Row = {"exported": True}
    try:
        data = made.model_proto.SerializeToString()
        found["bytes"] = len(data)
        session = load_session(data, 1)
        leaves = [t for t in torch.utils._pytree.tree_leaves(sample) if isinstance(t, Tensor)]
        inputs = session.get_inputs()  # inputs that nothing reads are not among them
        by_name = dict(zip([value.name for value in made.model.graph.inputs], leaves, strict=True))
        feeds = {value.name: by_name[value.name].numpy() for value in inputs}
        got = [torch.from_numpy(a) for a in session.run(None, feeds)]
        found |= judged([difference(got, tensors(expected))], RECIPES["dense"])
    except Exception as error:  # noqa: BLE001  # a file that does not run is a finding
        found["error"] = reason(error)
    return found


def _by_recast(row: Row, zoo: Any, model: nn.Module, sample: Sample, shapes: Any, tell: Tell) -> Callable[[], None]:
    """Capture, and the dense program; gives what does the other recipe. Raises RecastError where fixed sizes are worth a try."""
    torch._dynamo.reset()
    program = timed(row, "capture", lambda: recast.capture(model, *sample, shapes), time.process_time)
    samples = _samples(zoo, program, model, sample)
    row |= {"captured": True, "sizes": "free" if shapes is None else "example", "nodes": len(program.graph.nodes)}
    row["shapes"] = [[list(t.shape) for t in tensors(one)] for one in samples]

    def lowered(recipe: str) -> None:
        row[recipe] = timed(row, recipe, lambda: _lowered(program, samples, recipe, RECIPES[recipe]), time.process_time)
        tell(row)

    lowered("dense")
    if shapes is None and "refused" in row["dense"]:
        raise RecastError(row.pop("dense")["refused"])
    return lambda: lowered("int8")


def _samples(zoo: Any, program: Program, model: nn.Module, sample: Sample) -> list[Sample]:
    """The example, and inputs of another shape that the program takes; of the same shape where it takes no other."""
    for seed, (batch, length) in enumerate(SHAPES):
        with contextlib.suppress(Exception):  # the model, or the program, does not take the size
            other = zoo.vary(model, batch, length, seed=seed + 1)
            _run(program, other)
            return [sample, other]
    other = zoo.vary(model, 2, 10, seed=9)
    return [sample, other]


def _lowered(program: Program, samples: list[Sample], recipe: str, bound: float) -> Row:
    """A recipe's program in ONNX: whether file and numbers stand up, or why there is none."""
    given: Any = {"verification": False, "measure": False, "pictures": False, "progress": False}
    rewritten = recast.rewrite(program, recast.plan(program, recipe), cache=OperatorCache(None), **given)
    try:
        artifact = recast.lower(rewritten, "onnx", threads=1)
    except RecastError as error:
        return {"refused": reason(error)}
    found = _file(artifact)
    found |= judged([_compared(artifact, rewritten, one) for one in samples], bound)
    return found


def _file(artifact: Artifact) -> Row:
    """What onnx has to say about a file, and its bytes."""
    import onnx
    import onnx_ir

    proto = onnx_ir.to_proto(artifact.lowering._model)  # type: ignore[attr-defined]
    found: Row = {"bytes": proto.ByteSize()}
    for step, check in (("checker", onnx.checker.check_model), ("inference", _inferred)):
        try:
            check(proto)
        except Exception as error:  # noqa: BLE001  # a file that onnx refuses is a finding
            found[step] = reason(error)
    return found


def _inferred(proto: Any) -> None:
    import onnx

    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


def _compared(artifact: Artifact, rewritten: Program, sample: Sample) -> tuple[float, str]:
    expected = _run(rewritten, sample)
    try:
        got = _run(artifact, sample)
    except Exception as error:  # noqa: BLE001
        return math.inf, f"does not run: {reason(error)}"
    return difference(tensors(got), tensors(expected))


def judged(differences: list[tuple[float, str]], bound: float) -> Row:
    """The largest of some differences as entries of a row."""
    worst, told = max(differences, key=lambda one: one[0])
    matches = worst <= bound
    entry: Row = {"difference": worst if math.isfinite(worst) else None, "matches": matches}
    return entry if matches else entry | {"differs": told}


def difference(got: list[Tensor], expected: list[Tensor]) -> tuple[float, str]:
    """Largest difference relative to the largest value of each result, and of which result; infinite for another structure."""
    if len(got) != len(expected):
        return math.inf, f"{len(got)} results instead of {len(expected)}"
    worst = 0.0, ""
    for position, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            kinds = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (a, b)]
            return math.inf, f"result {position} is {kinds[0]} instead of {kinds[1]}"
        if b.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return math.inf, f"result {position} ({b.dtype}) has other values"
            continue
        finite = torch.isfinite(b)
        same = torch.equal(torch.isfinite(a), finite)
        if not same or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return math.inf, f"result {position} is not finite elsewhere"
        if bool(finite.any()):
            x, y = a[finite].double(), b[finite].double()
            off = float((x - y).abs().max()) / max(float(y.abs().max()), 1e-30)
            if off > worst[0]:
                worst = off, f"result {position} differs by {off:.2g} of its largest value"
    return worst


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def reason(error: BaseException) -> str:
    """One line about an error, without folders of this machine."""
    text = without_paths(str(error))[:300]
    return text if isinstance(error, RecastError | Late) else f"{type(error).__name__}: {text}"


def torch_reason(error: BaseException) -> str:
    """What torch's exporter failed at: the innermost cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return str(error) if isinstance(error, Late) else f"{type(error).__name__}: {without_paths(lines[0])[:300]}"


def _run(program: Runs, sample: Sample, seed: int = SEED) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        return program(*sample[0], **sample[1])


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise `Late` where something takes more seconds of the processor."""

    def ring(number: int, frame: Any) -> None:
        raise Late(f"{what}: not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
