"""Saving and loading: the same bits again, whole or not at all, and nothing in a file is run."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import recast
from recast.lowering import artifact as module
from recast.lowering.artifact import Artifact
from recast.passes.cache import OperatorCache
from recast.patterns.errors import ArtifactError, TargetError


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None
    count: Tensor


torch.export.register_dataclass(Result)


class Model(nn.Module):
    """Odd sizes, a weight that is not contiguous, a packed one in two forms, bf16, a counter, flags, nested inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(63, 90), nn.Linear(30, 17)
        self.turned = nn.Parameter(torch.randn(63, 63).t())
        self.narrow = nn.Parameter(torch.randn(63, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: dict[str, Tensor], *, scale: Tensor, double: bool = False) -> Result:
        h = x["a"] @ self.turned + x["b"] * self.narrow.float()
        q, k, v = self.packed(h).split(30, -1)
        self.seen.add_(x["a"].shape[0])
        y = self.out((q * k).tanh() + v) * scale
        return Result(y * 2 if double else y, None, self.seen + 0)


def example(batch: int = 2, length: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(batch)
    a, b = (torch.randn(batch, length, 63, generator=generator) for _ in range(2))
    return {"a": a, "b": b}, torch.tensor(0.5)


RECIPE = {
    "rules": [
        {"match": "packed.q", "form": "low_rank(ratio=0.4)"},
        {"match": "packed.k", "form": "int8"},
        {"match": "packed.v", "form": "dense"},
        {"match": "out", "form": "int4(group=8) + low_rank(rank=2)"},
    ],
    "allow_larger": True,
}


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    torch.manual_seed(0)
    x, scale = example()
    program = recast.capture(Model().eval(), (x,), {"scale": scale, "double": True})
    cache = OperatorCache(None)
    plan = recast.plan(
        program, RECIPE, recast.calibrate(program, [{"x": x, "scale": scale, "double": True}]), cache=cache
    )
    assert set(plan.entries) == {"packed.q", "packed.k", "out"}
    return recast.lower(recast.rewrite(program, plan, cache=cache), target="eager")


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    artifact.save(tmp_path / "out")
    return tmp_path / "out"


def test_bit_identical_after_loading(artifact: Artifact, saved: Path) -> None:
    loaded = recast.load(saved)
    for batch, length in ((2, 5), (1, 1), (3, 17)):
        x, scale = example(batch, length)
        artifact.program.weights["seen"].fill_(7)
        loaded.program.weights["seen"].fill_(7)
        one, two = artifact(x, scale=scale, double=True), loaded(x, scale=scale, double=True)
        assert type(two) is Result
        assert torch.equal(one.logits, two.logits)
        assert one.hidden is two.hidden is None
        assert int(two.count) == int(one.count) == 7 + batch
    assert loaded.report.to_dict() == artifact.report.to_dict()
    assert str(loaded.plan) == str(artifact.plan)
    assert str(loaded.program) == str(artifact.program)
    assert loaded.target == "eager"


def test_a_loaded_artifact_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    recast.load(saved).save(tmp_path / "again")
    for name in ("weights.safetensors", "plan.yaml", "report.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_layout_of_weights_is_kept(artifact: Artifact, saved: Path) -> None:
    before, after = artifact.program.weights, recast.load(saved).program.weights
    assert before["turned"].stride() == after["turned"].stride() == (1, 63)
    ours, theirs = (dict(p.module.named_buffers()) for p in (artifact.program, recast.load(saved).program))
    held = [n for n in ours if n.startswith("recast_operators.")]
    assert held
    assert [ours[n].stride() for n in held] == [theirs[n].stride() for n in held]


def test_holds_nothing_that_is_unpickled_and_no_rewritten_weight(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} - {"report.html"} == {
        "plan.yaml", "recast.json", "recast.json.sha256", "report.json", "weights.safetensors"
    }  # fmt: skip
    from safetensors import safe_open

    with safe_open(saved / "weights.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "packed.weight" not in names
    assert "packed.bias" in names


def test_runs_without_the_model_in_a_process_of_its_own(saved: Path) -> None:
    """The class of the result is not known there: it comes back as a dictionary, and nothing else is imported."""
    code = f"""
import sys, torch, recast
artifact = recast.load({str(saved)!r})
result = artifact({{"b": torch.ones(2, 5, 63), "a": torch.ones(2, 5, 63)}}, scale=torch.tensor(0.5), double=True)
assert type(result) is dict, type(result)
print(sorted(result), float(result["logits"].sum()))
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['count', 'logits']") or done.stdout.startswith("['count', 'hidden', 'logits']")


def test_mistaken_calls_are_refused(artifact: Artifact) -> None:
    x, scale = example()
    with pytest.raises(TypeError, match="was the constant True at capture and is False now"):
        artifact(x, scale=scale, double=False)
    with pytest.raises(TypeError, match=r"not given: \['scale'\]"):
        artifact(x, double=True)
    with pytest.raises(TypeError, match=r"input 'x\['a'\]' was captured as"):
        artifact({"a": x["a"].double(), "b": x["b"]}, scale=scale, double=True)


# Damage.


def damage_flip(folder: Path) -> str:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    return "weights.safetensors' is damaged"


def damage_cut(folder: Path) -> str:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-100])
    return "weights.safetensors' is damaged"


def damage_missing(folder: Path) -> str:
    (folder / "plan.yaml").unlink()
    return "plan.yaml' is missing; copy the whole folder"


def damage_json(folder: Path) -> str:
    text = (folder / "recast.json").read_text()
    (folder / "recast.json").write_text(text.replace('"eager"', '"eagre"'))
    return "recast.json' is damaged"


def damage_seal(folder: Path) -> str:
    (folder / "recast.json.sha256").unlink()
    return "recast.json.sha256', the checksum of .* is missing; copy the whole folder"


def damage_all(folder: Path) -> str:
    (folder / "recast.json").unlink()
    return "holds no recast.json; give a folder that"


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_missing, damage_json, damage_seal, damage_all])
def test_damage_is_found_before_anything_is_read(saved: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(saved)
    with pytest.raises(ArtifactError, match=expected):
        recast.load(saved)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no recast\.json"):
        recast.load(tmp_path / "nowhere")


# Malice: checksums are right, the contents are not.


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "recast.json").read_text())
    change(data)
    text = json.dumps(data)
    (folder / "recast.json").write_text(text)
    (folder / "recast.json.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def operators(**row: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["program"]["operators"].update({row.pop("name"): {"site": "", "form": "", **row}})


def first(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(row for row in data["program"]["nodes"] if row["op"] == op)


@pytest.mark.parametrize(
    "target",
    [
        "builtins.eval", "os.system", "posix.system", "subprocess.run", "operator.attrgetter", "_operator.methodcaller",
        "operator.call", "_operator.itemgetter", "operator.__import__", "math.__loader__", "torch.load",
        "torch.hub.load", "torch.sym_", "torch.ops", "torch.ops.aten", "torch.ops.aten.add", "eval", "",
        "torch.ops.aten.from_file.default",
        "torch.ops.__class__.__init__", "operator.iadd", "nonsense.nothing",
    ],
)  # fmt: skip
def test_only_operations_may_be_named(saved: Path, target: str) -> None:
    forge(saved, lambda data: first(data, "call_function").update(target=target))
    with pytest.raises(ArtifactError, match=r"operation .* (may not be named|is not known)"):
        recast.load(saved)


INJECTED = '__import__("os").system("touch recast-was-here")'
INJECTED_NAME = f'x"), {INJECTED}, ("'


@pytest.mark.parametrize(
    "change",
    [
        lambda d: first(d, "get_attr").update(target=INJECTED_NAME),
        lambda d: first(d, "placeholder").update(target=f"x={INJECTED}"),
        lambda d: first(d, "placeholder").update(name=f"x={INJECTED}"),
        lambda d: first(d, "call_function").update(kwargs={"dict": [[f"x={INJECTED},y", 1]]}),
        lambda d: first(d, "call_function").update(op="call_method", target="__class__"),
        lambda d: first(d, "call_module").update(target=INJECTED_NAME),
        operators(name=INJECTED_NAME, config={"kind": "dense"}),
        operators(name="a.b", config={"kind": "os.system"}),
        lambda d: d["program"]["nodes"][-1].update(args=[{"tuple": [{"lambda": "x"}]}]),
        lambda d: d["program"].pop("nodes"),
        lambda d: d.pop("files"),
        lambda d: d.update(target="../../x"),
        lambda d: d["program"].update(nodes=[[]]),
        lambda d: d["program"]["interface"].update(in_spec={"kind": "object", "class": "os:system", "children": ["*"]}),
        lambda d: d.update(format="recast-artifact-0"),
    ],
)  # fmt: skip
def test_forged_descriptions_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "recast-was-here"
    forge(saved, change)
    try:
        with pytest.raises((ArtifactError, TargetError)):
            recast.load(saved)(*example(), double=True)
    except TypeError:  # the structure of the inputs was replaced: calling is refused, nothing ran
        pass
    assert not mark.exists()


def test_names_that_lead_out_of_the_folder_only_ever_read(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("x")
    forge(saved, lambda d: d["files"].update({"../secret": "0" * 64}))
    with pytest.raises(ArtifactError, match="damaged"):
        recast.load(saved)
    assert outside.read_text() == "x"


# Writing: whole or not at all.


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_an_existing_folder_is_kept_unless_forced(artifact: Artifact, saved: Path) -> None:
    (saved / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match="'out' exists; pass --force"):
        artifact.save(saved)
    assert (saved / "mine.txt").exists()
    artifact.save(saved, force=True)
    assert not (saved / "mine.txt").exists()
    assert recast.load(saved).target == "eager"
    assert leftovers(saved.parent) == {"out"}


def test_a_file_in_the_way(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArtifactError, match="exists"):
        artifact.save(tmp_path / "out")
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.save(tmp_path / "out", force=True)
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.save(tmp_path / "out" / "below")
    assert leftovers(tmp_path) == {"out"}


def test_a_folder_that_may_not_be_written(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *a, **k: False)  # permissions do not hold for the superuser
    with pytest.raises(ArtifactError, match="cannot be written: no permission in"):
        artifact.save(tmp_path / "out")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("step", ["save_file", "_checksum"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_the_old_or_nothing(
    artifact: Artifact, saved: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        if step == "save_file":
            save_file({"half": torch.zeros(3)}, args[1])
        raise error

    monkeypatch.setattr(module, step, fail)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    message = "No space left on device; nothing was left" if isinstance(error, OSError) else None
    for target, force in ((saved.parent / "new", False), (saved, True)):
        with pytest.raises(expected, match=message):
            artifact.save(target, force=force)
    monkeypatch.undo()
    assert leftovers(saved.parent) == {"out"}
    assert recast.load(saved).target == "eager"


def test_failing_to_put_the_new_in_place_brings_the_old_back(
    artifact: Artifact, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if Path(target).name == "out" and self.name.startswith(".out.") and ".old." not in str(self):
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        artifact.save(saved, force=True)
    monkeypatch.undo()
    assert leftovers(saved.parent) == {"out"}
    assert recast.load(saved).target == "eager"


def test_unknown_targets_and_options_name_what_there_is(artifact: Artifact) -> None:
    with pytest.raises(TargetError, match="there is no target 'eagre'; did you mean 'eager'"):
        recast.lower(artifact.program, target="eagre")
    with pytest.raises(TargetError, match="target 'eager'"):
        recast.lower(artifact.program, target="eager", speed=11)


def test_optimize_does_it_all_and_refuses_early() -> None:
    calls = []

    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    with pytest.raises(TargetError, match="no target"):
        recast.optimize(Loud(8, 8).eval(), (torch.randn(2, 8),), target="cuda")
    assert not calls, "an unknown target is refused before the work"
    x = torch.randn(3, 64)
    done = recast.optimize(
        nn.Sequential(nn.Linear(64, 64)).eval(),
        (x,),
        recipe="int8",
        batches=[x],
        target="eager",
        cache=OperatorCache(None),
    )
    assert done(x).shape == (3, 64)
    (row,) = done.report.to_dict()["sites"]
    assert {"name", "form", "bytes_before", "bytes_after", "predicted_error", "measured_error", "kernel"} <= set(row)
    assert 0 < row["measured_error"] < 2 * row["predicted_error"]


def test_force_replaces_an_artifact_and_nothing_else(tmp_path: Path) -> None:
    program = recast.capture(torch.nn.Linear(8, 4).eval(), (torch.randn(3, 8),))
    artifact = recast.lower(program, "eager")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ArtifactError, match="holds something other than an artifact"):
        artifact.save(mine, force=True)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "precious"
    empty = tmp_path / "empty"
    empty.mkdir()
    artifact.save(empty, force=True)
    artifact.save(empty, force=True)
    assert recast.load(empty).target == "eager"


def test_masked_multi_head_attention_comes_back(tmp_path: Path) -> None:
    """Its products add the mask (`baddbmm`), whose shapes torch works out for free sizes in Python only."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x, key_padding_mask=~mask)[0]
            return found

    model, x, mask = Masked().eval(), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    artifact = recast.optimize(model, (x, mask), recipe="int8", target="eager")
    artifact.save(tmp_path / "out")
    again = recast.load(tmp_path / "out")
    assert torch.equal(again(x, mask), artifact(x, mask))
    assert again(torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool)).shape == (3, 7, 16)
