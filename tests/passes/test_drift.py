"""Drift of layers: measured as an oracle does that runs the modules themselves, and groups cut where it is large."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.passes.drift import divergence
from recast.passes.forms import Form
from recast.passes.forms.shared import groups_of
from recast.patterns.errors import CalibrationError, PlanError
from tests.helpers import assert_close

WIDTH, CLASSES = 16, 23


class Layer(nn.Module):
    """Reads the tokens before, and ends in an operation after its last product."""

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.alone = alone

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        y = y + self.mix(y).cumsum(1) / steps
        if bias is not None:
            y = y + bias
        y = self.down(torch.relu(self.up(y)))
        return y if self.alone else torch.nn.functional.softplus(x + y)


class Model(nn.Module):
    def __init__(self, kind: str = "plain", count: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer(alone=kind == "additions outside") for _ in range(count))
        self.bias = nn.Linear(1, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=kind == "plain")

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """What each layer leaves behind."""
        found = [self.embed(ids)]
        bias = self.bias(torch.ones(1, 1, 1, dtype=found[0].dtype)) if self.kind == "bias of all" else None
        for layer in self.layers:
            y = layer(found[-1], bias)
            found.append(found[-1] + y if self.kind == "additions outside" else y)
        return found[1:]

    def forward(self, ids: Tensor) -> Any:
        hidden = self.hidden(ids)
        x = self.norm(hidden[-1])
        if self.kind == "last token":
            x = x[:, -1:]
        if self.kind == "transform":
            x = torch.nn.functional.gelu(self.dense(x))
        if self.kind == "pooled":
            seen = (ids != 0).to(torch.int64).unsqueeze(-1)
            x = (x * seen).sum(1) / seen.sum(1).clamp(min=1)
        logits = self.head(x)
        if self.kind == "soft cap":
            logits = torch.tanh(logits / 0.5) * 0.5
        if self.kind == "some tokens":
            logits = logits[:, 1:]
        if self.kind == "last that counts":
            logits = logits[torch.arange(ids.shape[0]), (ids != 0).sum(1) - 1]
        return (logits, *hidden) if self.kind == "hidden states" else logits


def made(kind: str = "plain", **options: Any) -> Model:
    torch.manual_seed(3)
    model = Model(kind, **options)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.down.weight.mul_(1 + i)  # type: ignore[union-attr, operator]
    return model.double().eval()


def batches_of(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 50, shape, generator=generator) for shape in shapes]


def told_apart(model: Model, batches: list[Tensor]) -> np.ndarray:
    """The same in numpy: what the modules leave behind, averaged, through norm and head written out."""

    def array(value: Any) -> np.ndarray:
        found: np.ndarray = value.detach().numpy()
        return found

    total = np.zeros(len(model.layers) - 1)
    for ids in batches:
        told = []
        for hidden in model.hidden(ids):
            x = array(hidden).reshape(-1, WIDTH).mean(0)
            x = (x - x.mean()) / np.sqrt(x.var() + model.norm.eps) * array(model.norm.weight) + array(model.norm.bias)
            if model.kind == "transform":
                x = array(nn.functional.gelu(torch.from_numpy(array(model.dense.weight) @ x + array(model.dense.bias))))
            x = array(model.head.weight) @ x + (array(model.head.bias) if model.head.bias is not None else 0)
            x = np.tanh(x / 0.5) * 0.5 if model.kind == "soft cap" else x
            told.append(np.exp(x) / np.exp(x).sum())
        total += [float((p * np.log(p / q)).sum()) for p, q in itertools.pairwise(told)]
    return total / len(batches)


KINDS = [
    "plain",
    "soft cap",
    "transform",
    "last token",
    "some tokens",
    "pooled",
    "last that counts",
    "hidden states",
    "bias of all",
    "additions outside",
]


@pytest.mark.parametrize("static", [False, True], ids=["free sizes", "fixed sizes"])
@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_that_of_the_modules_run_one_by_one(kind: str, static: bool) -> None:
    model = made(kind)
    example = torch.randint(1, 50, (2, 5))
    program = recast.capture(model, (example,), dynamic_shapes={"ids": None} if static else None)
    batches = batches_of((2, 5), (2, 5)) if static else batches_of((3, 4), (1, 7), (2, 5))
    found = recast.calibrate(program, batches, drift=True).drift
    assert list(found) == ["layers.0", "layers.1", "layers.2"]
    assert_close(
        torch.tensor(list(found.values()), dtype=torch.float64), torch.tensor(told_apart(model, batches)), terms=2000
    )


def test_divergence_is_none_of_equal_distributions_and_that_of_the_formula_else() -> None:
    one, other = torch.randn(3, 9), torch.randn(3, 9)
    assert torch.equal(divergence(one, one), torch.zeros(3, dtype=torch.float64))
    p, q = (np.exp(x.double().numpy()) for x in (one, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert_close(divergence(one, other), torch.tensor((p * np.log(p / q)).sum(1)), terms=9)
    assert_close(divergence(one + 5, other - 2), divergence(one, other), terms=9, factor=1e9)  # float32 sums


def test_without_being_asked_nothing_is_measured(calibration: Calibration, program: recast.Program) -> None:
    plain = recast.calibrate(program, batches_of((2, 5)))
    assert plain.drift == {}
    assert plain.hash == dataclasses.replace(recast.calibrate(program, batches_of((2, 5)), drift=True), drift={}).hash
    assert dataclasses.replace(calibration, drift={}).hash != calibration.hash


@pytest.fixture(scope="module")
def model() -> Model:
    """Six layers in two runs: the fourth turns the residual values around, the others hardly touch them."""
    torch.manual_seed(5)
    model = Model(count=6).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.down.weight.mul_(30 if i == 3 else 0.01)  # type: ignore[union-attr, operator]
            layer.down.bias.mul_(0.01)  # type: ignore[union-attr, operator]
        for layer in model.layers:
            layer.forward = _quiet(layer)  # type: ignore[method-assign, assignment]
    return model


def _quiet(layer: nn.Module) -> Callable[..., Tensor]:
    def forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = layer.norm(x) + layer.mix(layer.norm(x))  # type: ignore[operator]
        return x + layer.down(torch.relu(layer.up(y)))  # type: ignore[no-any-return, operator]

    return forward


@pytest.fixture(scope="module")
def program(model: Model) -> recast.Program:
    return recast.capture(model, (torch.randint(1, 50, (2, 5)),))


@pytest.fixture(scope="module")
def calibration(program: recast.Program) -> Calibration:
    return recast.calibrate(program, batches_of((4, 20), (4, 20)), drift=True)


def test_two_runs_of_layers_are_found(calibration: Calibration) -> None:
    assert max(calibration.drift, key=lambda name: calibration.drift[name]) == "layers.2"
    names = [f"layers.{i}.up" for i in range(6)]
    form = Form.parse("shared_atoms(2, group=3, across='drift')")
    groups = groups_of(dict.fromkeys(names, form), dict.fromkeys(names, (40, WIDTH)), calibration.drift)
    assert groups == [names[:3], names[3:]]
    shifted = {f"layers.{i}": 1.0 if i == 0 else 0.1 for i in range(5)}
    assert groups_of(dict.fromkeys(names, form), dict.fromkeys(names, (4, 4)), shifted) == [names[:1], names[1:]]


@pytest.mark.parametrize(
    ("text", "numbers", "sizes"),
    [
        ("shared_atoms(2, across='drift')", range(6), [6]),  # group=0 is one group
        ("shared_atoms(2, across='drift', group=1)", range(6), [1] * 6),
        ("shared_atoms(2, across='drift', group=2)", range(6), [1, 2, 3]),
        ("shared_atoms(2, across='drift', group=4)", range(6), [3, 3]),
        ("shared_atoms(2, across='drift', group=9)", range(6), [6]),
        ("shared_basis(4, across='drift')", range(6), [1, 2, 3]),
        # What was left out between the second and the last counts: 0.9 + 0.3 + 0.3.
        ("shared_atoms(2, across='drift', group=2)", [0, 1, 5], [2, 1]),
    ],
)
def test_groups_are_as_many_as_runs_of_that_size(text: str, numbers: Any, sizes: list[int]) -> None:
    drift = {"m.h.0": 0.5, "m.h.1": 0.3, "m.h.2": 0.9, "m.h.3": 0.3, "m.h.4": 0.3}
    names = [f"m.h.{i}.experts.1.up" for i in numbers]
    groups = groups_of(dict.fromkeys(reversed(names), Form.parse(text)), dict.fromkeys(names, (8, 8)), drift)
    assert [len(group) for group in groups] == sizes
    assert [name for group in groups for name in group] == names


def test_of_equal_drifts_the_first_is_cut_and_other_sites_stay_alone() -> None:
    form = Form.parse("shared_atoms(2, group=2, across='drift')")
    names = [f"layers.{i}.mlp.{j}" for i in (10, 9, 8) for j in (0, 2)] + ["head.0", "head.1", "layers"]
    drift = {"layers.8": 0.25, "layers.9": 0.25}
    groups = groups_of(dict.fromkeys(names, form), dict.fromkeys(names, (8, 8)), drift)
    layered = [[f"layers.{i}.mlp.{j}" for i in run] for j in (0, 2) for run in ((8,), (9, 10))]
    assert sorted(groups) == sorted([*layered, ["head.0"], ["head.1"], ["layers"]])


RECIPE = {
    "rules": [
        {"match": "*.up", "form": "shared_atoms(2, group=3, across='drift')"},
        {"match": "*.mix", "form": "shared_basis(6, group=3, across='drift')"},
    ]
}


def test_from_plan_to_artifact(model: Model, program: recast.Program, calibration: Calibration, tmp_path: Path) -> None:
    plan = recast.plan(program, RECIPE, calibration)
    assert plan.statistics == calibration.hash
    rewritten = recast.rewrite(program, plan)
    ids = torch.randint(1, 50, (3, 4))
    changed = dict(model.state_dict())
    for rule in RECIPE["rules"]:
        kind = rule["match"][2:]
        for run in (range(3), range(3, 6)):
            names = [f"layers.{i}.{kind}" for i in run]
            weights = [model.get_parameter(f"{name}.weight").detach() for name in names]
            known = [calibration[name].regular for name in names]
            operators = Form.parse(rule["form"]).fit_together(weights, known)
            changed |= {f"{name}.weight": o.to_dense() for name, o in zip(names, operators, strict=True)}
    with torch.no_grad():
        expected = torch.func.functional_call(model, changed, (ids,))
        assert_close(rewritten(ids), expected, terms=400, factor=64)
        assert float((expected - model(ids)).norm()) > 1e-3 * float(expected.norm())
        recast.lower(rewritten, "eager").save(tmp_path / "saved")
        assert torch.equal(recast.load(tmp_path / "saved")(ids), rewritten(ids))
    held = {n: t.data_ptr() for n, t in rewritten.module.named_buffers(remove_duplicate=False) if "atom0" in n}
    assert [list(held.values()).count(address) for address in dict.fromkeys(held.values())] == [3, 3]
    # As text, with statistics from a file.
    calibration.save(tmp_path / "statistics.safetensors")
    again = recast.rewrite(
        program, recast.Plan.parse(str(plan)), calibration=Calibration.load(tmp_path / "statistics.safetensors")
    )
    assert torch.equal(again(ids), rewritten(ids))


def test_statistics_are_kept_with_their_drift(
    program: recast.Program, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "statistics.safetensors"
    calibration.save(file)
    loaded = Calibration.load(file)
    assert (loaded.drift, loaded.hash) == (calibration.drift, calibration.hash)
    assert loaded.restrict(program).drift == calibration.drift
    # A file of before there was drift.
    from recast.passes import calibration as module

    save = module.save_file

    def without(tensors: Any, path: Any, metadata: dict[str, str]) -> None:
        del metadata["drift"]
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", without)
    calibration.save(file)
    assert Calibration.load(file).drift == {}


def test_a_plan_by_drift_says_what_it_needs(program: recast.Program, calibration: Calibration) -> None:
    with pytest.raises(
        PlanError, match=r"across='drift'\)' groups layers by .*there is no calibration; recast.calibrate"
    ):
        recast.plan(program, RECIPE)
    with pytest.raises(
        PlanError, match=r"this calibration was made without; recast.calibrate\(program, batches, drift=T"
    ):
        recast.plan(program, RECIPE, dataclasses.replace(calibration, drift={}))
    text = str(recast.plan(program, RECIPE, calibration)).replace(f"statistics: {calibration.hash}", "statistics: null")
    with pytest.raises(PlanError, match="groups layers by the drift"):
        recast.rewrite(program, recast.Plan.parse(text))


class Encoder(nn.Module):
    """Ends in hidden values, as an encoder of sentences does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, Model()
        self.mixed = nn.Linear(4 * WIDTH, 3)
        self.narrow = nn.ModuleList([nn.Linear(WIDTH, 12), nn.Linear(12, 8)])

    def forward(self, ids: Tensor) -> Any:
        x = self.body.hidden(ids)[-1]
        if self.kind == "hidden":
            return self.body.norm(x)
        if self.kind == "pooler":
            return self.body.norm(x), torch.tanh(self.body.dense(x[:, 0]))
        if self.kind == "layers alone":
            return x
        if self.kind == "no layers":
            return self.body.head(self.body.embed(ids))
        if self.kind == "of other sizes":
            first, second = self.narrow
            return self.body.dense(nn.functional.pad(second(first(self.body.embed(ids))), (4, 4)))
        return self.mixed(torch.cat(self.body.hidden(ids), -1))  # every layer's output goes on beside the others


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "hidden",
            r"no output of \w+ is what a last linear gives \(aten.layer_norm.default in 'body.norm'\); a model of",
        ),
        ("pooler", "no output of Encoder is what a last linear gives"),
        ("layers alone", "no output of Encoder is what a last linear gives"),
        ("no layers", "no modules that differ in a number"),
        ("of other sizes", "'narrow': what 'narrow.0' gives does not go on as one value, of the shape"),
        ("every layer", r"'body.layers': what 'body.layers.0' gives does not go on as one value"),
    ],
)
def test_models_without_layers_in_a_row_or_logits_are_refused(kind: str, message: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 5))
    program = recast.capture(Encoder(kind).eval(), (ids,))
    with pytest.raises(CalibrationError, match=message) as caught:
        recast.calibrate(program, [ids], drift=True)
    assert "across='layers'" in str(caught.value)
    assert recast.calibrate(program, [ids]).drift == {}
