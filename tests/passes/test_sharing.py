"""Forms that are fitted to several sites at once: through plan, rewrite, cache, artifact and every target."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form, Stats
from recast.passes.forms.form import data_error
from recast.passes.forms.shared import groups_of
from recast.patterns.errors import FormError, PlanError
from tests.helpers import assert_close


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.up, self.down = nn.Linear(36, 36), nn.Linear(36, 60), nn.Linear(60, 36)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x)
        return x + self.down(torch.relu(self.up(x)))


class Layers(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


RECIPE = {
    "rules": [
        {"match": "*.query", "form": "shared_atoms(2)"},
        {"match": "*.up", "form": "shared_basis(8, group=2) | int8"},
    ]
}


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    return recast.capture(Layers().eval(), (torch.randn(2, 5, 36),))


@pytest.fixture(scope="module")
def calibration(program: recast.Program) -> recast.Calibration:
    return recast.calibrate(program, [(torch.randn(4, 20, 36),), (torch.randn(4, 20, 36),)])


def weights_of(count: int, m: int, n: int) -> list[Tensor]:
    return [torch.randn(m, n, dtype=torch.float64) for _ in range(count)]


def stats_of(count: int, n: int) -> list[Stats]:
    mixes = [torch.randn(n, n, dtype=torch.float64) for _ in range(count)]
    return [Stats.from_inputs(torch.randn(200, n, dtype=torch.float64) @ mix) for mix in mixes]


def test_a_shared_basis_is_the_svd_of_the_stacked_matrices() -> None:
    weights = weights_of(3, 15, 21)
    made = Form.parse("shared_basis(6, group=3)").fit_together(weights, [None] * 3)
    sizes = np.linalg.svd(torch.cat(weights).numpy(), compute_uv=False)
    found = sum(data_error(w, o, None) for w, o in zip(weights, made, strict=True))
    assert_close(torch.tensor(found), torch.tensor((sizes[6:] ** 2).sum()), terms=3 * 15 * 21)
    assert len({id(o.children()["right"]) for o in made}) == 1


def test_a_shared_basis_of_a_ratio_holds_that_share_of_the_group() -> None:
    weights = weights_of(4, 24, 60)
    made = Form.parse("shared_basis(0.5, group=4)").fit_together(weights, [None] * 4)
    rank = made[0].children()["right"].shape[0]
    assert rank == int(0.5 * 4 * 24 * 60 / (60 + 4 * 24))
    assert rank > int(0.5 * 24 * 60 / (60 + 24))  # more than each could have for itself


def test_atoms_are_the_leading_components_of_the_matrices_as_vectors() -> None:
    weights = weights_of(5, 9, 14)
    made = Form.parse("shared_atoms(2)").fit_together(weights, [None] * 5)
    vectors = np.stack([w.numpy().ravel() for w in weights], 1)
    sizes = np.linalg.svd(vectors, compute_uv=False)
    found = sum(data_error(w, o, None) for w, o in zip(weights, made, strict=True))
    assert_close(torch.tensor(found), torch.tensor((sizes[2:] ** 2).sum()), terms=5 * 9 * 14)
    atoms = [made[0].children()[f"atom{i}"].to_dense() for i in range(2)]
    inner = torch.tensor([[float((a * b).sum()) for a in atoms] for b in atoms])
    assert_close(inner.double(), torch.eye(2, dtype=torch.float64), terms=9 * 14, factor=64)


@pytest.mark.parametrize("text", ["shared_atoms(2)", "shared_atoms(1, rank=3)", "shared_basis(5)"])
def test_fitted_on_data_a_group_is_better_there_and_never_worse(text: str) -> None:
    form = Form.parse(text)
    weights, stats = weights_of(4, 18, 12), stats_of(4, 12)

    def total(operators: list[recast.Operator]) -> float:
        return sum(data_error(w, o, s) for w, o, s in zip(weights, operators, stats, strict=True))

    assert total(form.fit_together(weights, stats)) < total(form.fit_together(weights, [None] * 4))


def test_each_matrix_has_the_best_coefficients_for_its_own_inputs() -> None:
    weights, stats = weights_of(4, 10, 8), stats_of(4, 8)
    for weight, known, made in zip(
        weights, stats, Form.parse("shared_atoms(2)").fit_together(weights, stats), strict=True
    ):
        assert known.gram is not None
        root = np.linalg.cholesky(known.gram.numpy())
        seen = [(made.children()[f"atom{i}"].to_dense().numpy() @ root).ravel() for i in range(2)]
        target = (weight.numpy() @ root).ravel()
        best = np.linalg.lstsq(np.stack(seen, 1), target, rcond=None)[0]
        assert_close(made.own_tensors()["coefficients"].double(), torch.from_numpy(best), terms=80, factor=1e4)


def test_more_atoms_and_a_residual_lower_the_error() -> None:
    weights = weights_of(6, 12, 12)

    def error(text: str) -> float:
        made = Form.parse(text).fit_together(weights, [None] * 6)
        return sum(data_error(w, o, None) for w, o in zip(weights, made, strict=True))

    errors = [error(f"shared_atoms({count})") for count in (1, 2, 4, 6)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-20
    assert error("shared_atoms(2, rank=3)") < errors[1]


def test_groups_are_runs_of_names_that_differ_in_their_last_number() -> None:
    names = [f"layers.{i}.experts.{j}.down" for i in (0, 1) for j in (0, 1, 10, 2)]
    shapes = dict.fromkeys(names, (4, 4))
    groups = groups_of(dict.fromkeys(names, Form.parse("shared_atoms(2)")), shapes)
    assert groups == [[f"layers.{i}.experts.{j}.down" for j in (0, 1, 2, 10)] for i in (0, 1)]
    (everything,) = groups_of(dict.fromkeys(names, Form.parse("shared_atoms(2, across='all')")), shapes)
    assert len(everything) == 8
    shapes[names[0]] = (4, 6)
    assert [names[0]] in groups_of(dict.fromkeys(names, Form.parse("shared_atoms(2)")), shapes)
    assert groups_of(dict.fromkeys(names, Form.parse("int8")), shapes) == []


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_what_is_shared_is_held_once_everywhere(
    target: str, program: recast.Program, calibration: recast.Calibration, tmp_path: Path
) -> None:
    plan = recast.plan(program, RECIPE, calibration)
    rewritten = recast.rewrite(program, plan)
    atoms = 2 * 36 * 36 * 4
    queries = sum(plan.entries[f"layers.{i}.query"].bytes_after for i in range(3))
    assert atoms + 3 * 2 * 4 <= queries <= atoms + 3 * (2 * 4 + 2)  # rounded up for each
    dense = sum(t.numel() * 4 for n, t in program.weights.items() if "query.weight" not in n and "up.weight" not in n)
    assert dense + atoms < rewritten.report.bytes_after < dense + atoms + 9000
    artifact = recast.lower(rewritten, target)
    artifact.save(tmp_path / "saved")
    loaded = recast.load(tmp_path / "saved")
    x = torch.randn(3, 4, 36)
    with torch.no_grad():
        expected = rewritten(x)
        assert_close(artifact(x), expected, terms=60, factor=64)
        assert torch.equal(loaded(x), artifact(x))
    stored = sum(f.stat().st_size for f in (tmp_path / "saved").rglob("*") if f.suffix in (".safetensors", ".onnx"))
    assert stored < rewritten.report.bytes_after + 40_000 < program.nbytes() + 40_000
    if target != "onnx":
        held = [t for n, t in loaded.program.module.named_buffers(remove_duplicate=False) if "atom0" in n]
        assert len(held) == 3
        assert len({t.data_ptr() for t in held}) == 1


def test_a_group_comes_from_the_cache_with_what_it_shares(
    program: recast.Program, calibration: recast.Calibration, tmp_path: Path
) -> None:
    first = OperatorCache(tmp_path)
    plan = recast.plan(program, RECIPE, calibration, cache=first)
    assert first.fits == 6
    again = OperatorCache(tmp_path)
    rewritten = recast.rewrite(program, plan, cache=again)
    assert again.fits == 0
    fresh = recast.rewrite(program, plan, cache=OperatorCache(None))
    assert rewritten.report.bytes_after == fresh.report.bytes_after
    x = torch.randn(2, 3, 36)
    assert torch.equal(rewritten(x), fresh(x))


def test_an_edited_plan_is_carried_out_with_the_sites_that_are_left(program: recast.Program) -> None:
    plan = recast.plan(program, {"rules": [{"match": "*.query", "form": "shared_atoms(2)"}]})
    del plan.entries["layers.1.query"]
    rewritten = recast.rewrite(program, plan)
    # Two atoms for two matrices: nothing is lost.
    x = torch.randn(2, 3, 36)
    assert_close(rewritten(x), program(x), terms=36 * 3, factor=64)


def test_shared_forms_where_they_cannot_stand() -> None:
    for text in ("shared_atoms(2) + low_rank(2)", "diagonal @ shared_basis(4)", "low_rank(4) | shared_basis(2)"):
        with pytest.raises(FormError, match=r"stands alone or left of|would share factors"):
            Form.parse(text)
    for text in ("shared_atoms(0)", "shared_basis(4, group=-1)", "shared_basis(4, across='layer')", "shared_basis"):
        with pytest.raises(FormError):
            Form.parse(text)


def test_a_budget_cannot_weigh_what_sites_share(program: recast.Program) -> None:
    with pytest.raises(PlanError, match="is shared between sites"):
        recast.plan(program, {"budget": 0.5, "candidates": ["int8", "shared_atoms(2)"]})


def test_groups_that_are_too_small_for_their_atoms_are_told(program: recast.Program) -> None:
    def notes(form: str) -> list[str]:
        recipe = {"rules": [{"match": "*.query", "form": form}], "allow_larger": True}
        return recast.plan(program, recipe, cache=OperatorCache(None)).notes

    assert not any("sharing saves" in note for note in notes("shared_atoms(2) | int8"))
    (told,) = (note for note in notes("shared_atoms(8) | int8") if "sharing saves" in note)
    assert told.startswith("shared_atoms(atoms=8): 8 atoms for a group of 3, which can use 3")
    assert "1 would save (at layers.0.query, layers.1.query, layers.2.query)" in told
