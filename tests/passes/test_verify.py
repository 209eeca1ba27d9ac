"""A pass that breaks something is caught and named, whatever it breaks, and both graphs are written down."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import recast
from recast.cli import run
from recast.passes import rewrite as rewriting
from recast.passes.base import Context, Pass, Pipeline, Soundness
from recast.passes.cache import OperatorCache
from recast.passes.failure import read_failure, replay, verify
from recast.passes.module import OperatorModule
from recast.passes.plan import Plan
from recast.passes.rules.apply_forms import ApplyForms
from recast.passes.verify import bounded_bound, exact_bound, probe_inputs, product_depth
from recast.patterns.errors import PlanError, VerificationError
from recast.patterns.program import Program, set_by_path

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(self.first(x).relu())
        return y, y.argmax(-1)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return recast.capture(Model().eval(), (torch.randn(3, 32),))


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def break_structure(program: Program) -> None:
    program.graph._root._prev.prepend(node(program, "relu"))  # behind what reads it


def break_shape(program: Program) -> None:
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        wide = program.graph.call_function(aten.unsqueeze.default, (relu, 0))
    wide.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def break_dtype(program: Program) -> None:
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        wide = program.graph.call_function(aten._to_copy.default, (relu,), {"dtype": torch.float64})
    wide.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def break_outputs(program: Program) -> None:
    output = program.graph.find_nodes(op="output")[0]
    output.args = (output.args[0][:1],)


def break_inputs(program: Program) -> None:
    with program.graph.inserting_before(node(program, "x")):
        program.graph.placeholder("extra").meta["val"] = node(program, "x").meta["val"]


def break_weight(program: Program) -> None:
    set_by_path(program.module, "first.weight", nn.Parameter(program.weights["first.weight"].detach().clone()))


def break_ownership(program: Program) -> None:
    program.module.register_buffer("stranger", torch.zeros(32))
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        added = program.graph.get_attr("stranger")
        added.meta["val"] = node(program, "first_bias").meta["val"]
    with program.graph.inserting_after(added):
        total = program.graph.call_function(aten.add.Tensor, (relu, added))
    total.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def break_numbers(program: Program) -> None:
    node(program, "relu").target = aten.gelu.default


def break_integers(program: Program) -> None:
    node(program, "argmax").target = aten.argmin.default


def break_finiteness(program: Program) -> None:
    node(program, "relu").target = aten.log.default


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    name: ClassVar[str] = "broken"
    soundness: ClassVar[Soundness] = Soundness.EXACT
    damage: Callable[[Program], None]

    def run(self, program: Program, context: Context) -> Program:
        result = program.copy()
        self.damage(result)
        result.module.recompile()
        return result

    def __str__(self) -> str:
        return "broken"


def context() -> Context:
    return Context(Plan("", {}), None, OperatorCache(None))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_structure, "the graph is malformed"),
        (break_shape, "is noted as f32"),
        (break_dtype, "is noted as f32.* but computes f64"),
        (break_outputs, "the number of outputs changed from 2 to 1"),
        (break_inputs, r"inputs changed from \['x'\] to \['extra', 'x'\]"),
        (break_weight, "weight 'first.weight' is another tensor than before"),
        (break_ownership, r"weights \['stranger'\] appeared from nowhere"),
        (break_numbers, r"output 0 differs by .* \(relative\), a pass that is exact may cause 0.000122"),
        (break_integers, "output 1 differs, though the pass is exact"),
        (break_finiteness, "output 0 is no longer finite"),
    ],
)
def test_each_kind_of_damage_is_caught_named_and_written_down(
    program: Program, damage: Callable[[Program], None], message: str
) -> None:
    step = Broken(damage)
    with pytest.raises(VerificationError, match=message) as caught:
        verify(program, program, step.run(program, context()), step, ["raise_sites", "apply_forms"], context())
    text = str(caught.value)
    assert text.startswith("verification: pass 'broken' broke the program: ")
    assert "passes before it: raise_sites, apply_forms" in text
    found = re.search(r"graphs before and after are in (\S+)", text)
    assert found is not None
    folder = Path(found.group(1))
    assert (folder / "before.txt").read_text() == str(program)
    assert "program Model(" in (folder / "after.txt").read_text()
    assert (folder / "pipeline.txt").read_text() == "raise_sites,apply_forms,broken\n"
    assert "sites: {}" in (folder / "plan.yaml").read_text()


@dataclasses.dataclass(frozen=True)
class Swap(Pass):
    """Puts another activation in the place of relu."""

    name: ClassVar[str] = "swap_activation"
    soundness: ClassVar[Soundness] = Soundness.EXACT
    by: str = "tanh"

    def run(self, program: Program, context: Context) -> Program:
        result = program.copy()
        node(result, "relu").target = getattr(aten, self.by).default
        result.module.recompile()
        return result


def fail(program: Program, monkeypatch: pytest.MonkeyPatch, by: str = "tanh") -> tuple[str, str]:
    """Let a pass at the end of a real rewrite break the program; gives the message and the folder."""
    steps = (*Pipeline.parse("raise_sites,apply_forms").passes, Swap(by))
    monkeypatch.setattr(rewriting, "pipeline_for", lambda plan: Pipeline(steps))
    statistics = recast.calibrate(program, [(torch.randn(70, 32),)])
    with pytest.raises(VerificationError) as caught:
        recast.rewrite(program, recast.plan(program, "int8", calibration=statistics))
    text = str(caught.value)
    found = re.search(r"to run it again: recast replay (\S+)$", text)
    assert found is not None, text
    return text, found.group(1)


def test_a_failure_runs_again_from_its_folder(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = fail(program, monkeypatch)
    failure = read_failure(folder)
    assert str(failure.pipeline) == "raise_sites,apply_forms,swap_activation"
    assert failure.context.plan.entries.keys() == {"first", "second"}
    assert failure.context.calibration is not None
    said: list[str] = []
    with pytest.raises(VerificationError) as again:
        replay(failure, said.append)
    assert [line.split(":")[0] for line in said] == ["raise_sites", "apply_forms"]
    figure = re.compile(r"output 0 differs by (\S+)")
    assert figure.findall(str(again.value)) == figure.findall(text) != []
    assert run(["replay", folder, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["now"] == str(again.value)
    assert printed["passes"] == said


def test_a_failure_that_is_mended_replays_to_the_end(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = fail(program, monkeypatch)
    (Path(folder) / "pipeline.txt").write_text("raise_sites,apply_forms,swap_activation{by=relu}\n")
    assert run(["replay", folder]) == 0
    assert "every pass is verified" in capsys.readouterr().out


def test_a_program_without_its_dense_weights_is_not_replayed(program: Program) -> None:
    step = Swap()
    released = recast.capture(Model().eval(), (torch.randn(3, 32),))
    released.weights["first.weight"].untyped_storage().resize_(0)
    with pytest.raises(VerificationError, match="cannot be replayed: its dense weights were released"):
        verify(released, program, step.run(program, context()), step, [], context())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "program.json").unlink(), "holds no program.json"),
        (lambda folder: (folder / "program.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "program.json").write_text('{"format": "other"}'), "has format 'other'"),
        (lambda folder: (folder / "program.safetensors").write_bytes(b"cut"), "cannot be read"),
        (lambda folder: (folder / "pipeline.txt").write_text("swap_actvation"), "did you mean 'swap_activation'"),
    ],
)
def test_damaged_failures_are_refused(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    _, folder = fail(program, monkeypatch)
    damage(Path(folder))
    assert run(["replay", folder]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_what_is_right_passes(program: Program) -> None:
    step = Broken(lambda program: None)
    found = verify(program, program, step.run(program, context()), step, [], context())
    assert found["output_error"] == 0
    assert found["weights_kept"] == 4


def swap(after: Program) -> None:
    """Put each operator in the other's place."""
    one, two = after.graph.find_nodes(op="call_module")
    one.target, two.target = two.target, one.target


def scale(after: Program) -> None:
    """Store an operator that was damaged after it was fitted."""
    for module in after.module.modules():
        if isinstance(module, OperatorModule):
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    setattr(module, name, buffer * 1.2)


def forward(after: Program) -> None:
    """Compute something else than the operator says."""
    for module in after.module.modules():
        if isinstance(module, OperatorModule):
            module.register_forward_hook(lambda m, args, y: y * 1.1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, "site '(first|second)' .* stands for a matrix that differs by"),
        (scale, "stands for a matrix that differs by 0.2.* from the weight, its fit differed by 0.00"),
        (forward, "computes something else than its matrix: 0.1 "),
    ],
)
def test_operators_are_checked_where_they_stand(
    program: Program, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Program], None], message: str
) -> None:
    run = ApplyForms.run

    def broken(self: ApplyForms, given: Program, context: Context) -> Program:
        result = run(self, given, context)
        damage(result)
        result.module.recompile()
        return result

    monkeypatch.setattr(ApplyForms, "run", broken)
    plan = recast.plan(program, "int8", cache=OperatorCache(None))
    with pytest.raises(VerificationError, match=f"pass 'apply_forms' broke the program: .*{message}"):
        recast.rewrite(program, plan, cache=OperatorCache(None))
    recast.rewrite(program, plan, cache=OperatorCache(None), verification=False)


def test_passes_run_in_the_order_they_need(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"'apply_forms' requires \['sites raised'\], which no pass before it"):
        Pipeline.parse("apply_forms,raise_sites").check()
    with pytest.raises(PlanError, match=r"no pass 'raise_site' .* did you mean 'raise_sites'"):
        Pipeline.parse("raise_site")
    with pytest.raises(PlanError, match="pass 'cast' has no option 'type'"):
        Pipeline.parse("cast{type=bf16}")
    with pytest.raises(PlanError, match="cannot be read"):
        Pipeline.parse("raise_sites;apply_forms")
    plan = recast.plan(program, {"default": "int8", "compute_dtype": "fp16"}, cache=OperatorCache(None))
    assert str(rewriting.pipeline_for(plan)) == "raise_sites,apply_forms,cast{dtype=fp16}"
    assert rewriting.pipeline_for(plan).soundness is Soundness.LOSSY
    assert Pipeline(()).soundness is Soundness.EXACT


def test_bounds(program: Program) -> None:
    assert product_depth(program) == 2
    assert exact_bound(torch.float32) == 2**-13
    assert exact_bound(torch.bfloat16) == 2**-3, "16-bit products add up in float32"
    assert bounded_bound(program, torch.bfloat16) == pytest.approx(8 * 2**-7 * 2**0.5)


def test_probe_inputs_are_valid_and_reproducible() -> None:
    class Many(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, x: Tensor, flag: bool) -> Tensor:
            return nn.functional.embedding(ids, x) * mask[..., None]

    args = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 5), True)
    program = recast.capture(Many().eval(), args)
    ids, mask, x, flag = probe_inputs(program)
    assert ids.dtype is torch.int64
    assert int(ids.max()) == 1
    assert bool(mask.all())
    assert flag is True
    assert torch.equal(x, probe_inputs(program)[2])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
