"""Shared forms whose groups are cut where layers drift: from statistics to an artifact."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.passes.forms import Form
from recast.passes.forms.shared import groups_of
from recast.patterns.errors import PlanError
from tests.helpers import assert_close
from tests.passes.drift_models import WIDTH, Model, batches_of


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


def test_without_being_asked_nothing_is_measured(calibration: Calibration, program: recast.Program) -> None:
    plain = recast.calibrate(program, batches_of((2, 5)))
    assert plain.drift == {}
    assert plain.hash == dataclasses.replace(recast.calibrate(program, batches_of((2, 5)), drift=True), drift={}).hash
    assert dataclasses.replace(calibration, drift={}).hash != calibration.hash
