"""Feed-forward blocks with fewer hidden features: the fit against numpy, what is planned, rewritten, reported and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recast
from recast.passes.calibrate import Calibration
from recast.passes.forms import Form, Stats, forms
from recast.passes.forms.registry import module_forms
from recast.passes.modules.nystrom import Nystrom, leverage_scores, on_features
from recast.passes.plan import Plan
from recast.patterns.errors import FormError, PlanError, RecipeError, VerificationError
from recast.patterns.program import Program
from tests.helpers import assert_close
from tests.passes.modules.models import HIDDEN, WIDTH, Blocks, Flat, Gated, Packed, Plain, Woven, captured, inputs

KEPT = 30  # of HIDDEN, at a ratio of 0.75


def planned(program: Program, recipe: object, calibration: Calibration | None) -> Plan:
    return recast.plan(program, recipe, calibration, progress=False)


def rewritten(model: nn.Module, recipe: object = "nystrom(ratio=0.75)") -> tuple[Program, Program, Calibration]:
    program, calibration = captured(model)
    return program, recast.rewrite(program, planned(program, recipe, calibration), progress=False), calibration


# ------------------------------------------------------------------ the fit


def test_scores_are_the_diagonal_of_the_ridge_projection() -> None:
    z = np.random.default_rng(0).normal(size=(50, 9)) * np.linspace(0.1, 2, 9)
    c = z.T @ z
    ridge = 0.03 * np.trace(c) / 9
    expected = np.diag(c @ np.linalg.inv(c + ridge * np.eye(9)))
    assert_close(leverage_scores(torch.from_numpy(c), 0.03), torch.tensor(expected), terms=81)


def test_last_linear_is_least_squares_of_the_dense_output() -> None:
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(70, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(5, 12))
    kept = np.array([0, 3, 4, 8, 11])
    expected = np.linalg.lstsq(z[:, kept], z @ w.T, rcond=None)[0].T
    found = on_features(torch.from_numpy(w), torch.from_numpy(z.T @ z), torch.from_numpy(kept))
    assert_close(found, torch.tensor(expected), terms=70, factor=1e4)  # the Gram matrix squares the condition


def test_large_features_that_tell_each_other_are_not_all_left_out() -> None:
    rng = np.random.default_rng(2)
    z, w = rng.normal(size=(400, 40)), rng.normal(size=(8, 40))
    z[:, 7] *= 6
    z[:, 21] = z[:, 7] + 0.01 * rng.normal(size=400)
    gram = torch.from_numpy(z.T @ z)
    first = np.sort(np.argsort(leverage_scores(gram, 0.01).numpy())[2:])  # what the scores of the paper keep
    assert 7 not in first
    assert 21 not in first
    solved = np.linalg.lstsq(z[:, first], z @ w.T, rcond=None)[0].T
    lost = np.linalg.norm(z @ w.T - z[:, first] @ solved.T)
    kept, found = Nystrom(0.95)._chosen(torch.from_numpy(w), gram, 38)
    assert np.linalg.norm(z @ w.T - z[:, kept.numpy()] @ found.numpy().T) < lost / 4


def test_features_that_are_always_zero_keep_their_columns() -> None:
    z = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 1] = 0
    w = torch.eye(4, dtype=torch.float64)
    found = on_features(w, z.T @ z, torch.tensor([0, 1, 2]))
    assert torch.equal(found[:, 1], w[:, 1])
    assert abs(float(leverage_scores(z.T @ z, 0.1)[1])) < 1e-12
    assert torch.equal(leverage_scores(torch.zeros(3, 3), 0.1), torch.zeros(3, dtype=torch.float64))


def test_rewritten_block_is_least_squares_on_the_features_kept() -> None:
    program, smaller, _ = rewritten(Plain())
    up, down = (smaller.weights[n] for n in ("up.weight", "down.weight"))
    assert (tuple(up.shape), tuple(down.shape)) == ((KEPT, WIDTH), (WIDTH, KEPT))
    z = torch.cat([F.gelu(F.linear(inputs(8, 16, s), program.weights["up.weight"], program.weights["up.bias"])).flatten(0, 1)
                   for s in range(2, 6)]).numpy()  # fmt: skip
    kept = [int((program.weights["up.weight"] == row).all(1).nonzero()) for row in up]
    expected = np.linalg.lstsq(z[:, kept], z @ program.weights["down.weight"].numpy().T, rcond=None)[0].T
    assert_close(down, torch.tensor(expected), terms=512, factor=1e5)
    assert torch.equal(smaller.weights["up.bias"], program.weights["up.bias"][kept])
    assert torch.equal(smaller.weights["down.bias"], program.weights["down.bias"])


# ------------------------------------------------------------------ through the library


@pytest.mark.parametrize("make", [Plain, Gated, Packed, Woven, Flat])
def test_what_is_reported_is_what_runs(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    program, smaller, _calibration = rewritten(make())
    (row,) = smaller.report.rows
    dense = sum(w.numel() for w in program.weights.values() if w.ndim == 2)
    assert row.bytes_before == 8 * dense
    assert row.bytes_after == 8 * sum(w.numel() for w in smaller.weights.values() if w.ndim == 2)
    assert row.flops_after == 2 * row.bytes_after // 8
    assert row.bytes_after < 0.8 * row.bytes_before
    # The error of the block's output on the calibration data, without what is added to it.
    bias = program.weights.get("down.bias", torch.zeros(WIDTH, dtype=torch.float64))
    data = [inputs(8, 16, s) for s in range(2, 6)]
    gaps = [((smaller(x) - program(x)).square().sum(), (program(x) - x - bias).square().sum()) for x in data]
    error = (sum(g for g, _ in gaps) / sum(s for _, s in gaps)) ** 0.5
    assert row.predicted_error == pytest.approx(float(error), rel=1e-6)
    assert 0.001 < row.predicted_error < 0.5
    assert row.measured_error is not None
    assert 0.5 < row.measured_error / row.predicted_error < 2
    assert list(smaller.report.passes) == ["apply_modules"]
    assert smaller.report.passes["apply_modules"]["verified"]
    for x in (inputs(1, 1), inputs(3, WIDTH), inputs(3, HIDDEN), inputs(1, KEPT)):
        assert smaller(x).shape == x.shape
        assert F.cosine_similarity(smaller(x).flatten(), program(x).flatten(), 0) > 0.9


def test_everything_kept_is_exact() -> None:
    torch.manual_seed(0)
    program, smaller, _ = rewritten(Gated(), {"default": "nystrom(ratio=1)", "allow_larger": True})
    assert [row.form for row in smaller.report.rows] == ["nystrom(ratio=1.0)"]
    assert smaller.report.rows[0].predicted_error == 0
    assert torch.equal(smaller(inputs()), program(inputs()))


def test_error_never_rises_with_what_is_kept() -> None:
    torch.manual_seed(0)
    program, calibration = captured(Gated())
    recipes = [f"nystrom(ratio={r})" for r in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]
    errors = [planned(program, r, calibration).entries["gate+up+down"].predicted_error for r in recipes]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1] > 0


def test_plan_is_text_and_needs_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, calibration = captured(Blocks(Gated(), Plain()))
    recipe = {"rules": [{"match": "layers.1", "kind": "mlp", "form": "nystrom(ratio=0.75, round_to=8)"}]}
    decided = planned(program, recipe, calibration)
    assert list(decided.entries) == ["layers.1"]
    assert decided.entries["layers.1"].bytes_after == 8 * 2 * WIDTH * 32
    decided.save(tmp_path / "plan.yaml")
    calibration.save(tmp_path / "statistics.safetensors")
    again = Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="which is not at hand; pass it"):
        recast.rewrite(program, again)
    smaller = recast.rewrite(program, again, calibration=Calibration.load(tmp_path / "statistics.safetensors"))
    direct = recast.rewrite(program, decided)
    assert_close(smaller(inputs()), direct(inputs()), terms=HIDDEN)
    again.statistics = None
    with pytest.raises(
        FormError, match=r"nystrom\(.*\): 'layers.1' is fitted to what flows through it; pass statistics"
    ):
        recast.rewrite(program, again)


def test_forms_of_matrices_follow_on_the_smaller_ones() -> None:
    torch.manual_seed(0)
    recipe = {
        "default": "int8",
        "rules": [{"match": "layers.*", "form": "nystrom(0.75)"}, {"match": "*.up", "form": "low_rank(10)"}],
    }
    program, smaller, _calibration = rewritten(Blocks(Gated(), Packed()), recipe)
    report = smaller.report
    assert [row.name for row in report.rows][:2] == ["layers.0", "layers.1"]
    shapes = {row.name: row.shape for row in report.rows}
    assert shapes["layers.0.up"] == (KEPT, WIDTH)
    assert shapes["layers.0.down"] == shapes["layers.1.down"] == (WIDTH, KEPT)
    assert {row.name: row.form for row in report.rows}["layers.0.up"] == "low_rank(rank=10)"
    assert list(report.passes) == ["apply_modules", "raise_sites", "apply_forms"]
    assert all(row.measured_error < 0.5 for row in report.rows)
    # Operations are counted once, from the model as it was to the model as it is.
    assert report.flops[0] == 2 * sum(w.numel() for w in program.weights.values() if w.ndim == 2)
    assert report.flops[1] < 0.8 * report.flops[0]
    again = type(report).from_dict(report.to_dict())
    assert again.rows == report.rows
    assert "layers.0" in str(report)


def test_one_block_called_twice_is_made_smaller_once() -> None:
    torch.manual_seed(0)
    block = Gated()
    program, smaller, _calibration = rewritten(Blocks(block, block))
    assert len(smaller.report.rows) == 1
    assert sum(w.numel() for w in smaller.weights.values()) == 3 * WIDTH * KEPT
    assert F.cosine_similarity(smaller(inputs()).flatten(), program(inputs()).flatten(), 0) > 0.9


def test_half_precision_weights_keep_their_dtype() -> None:
    torch.manual_seed(0)
    program = recast.capture(Gated().bfloat16().eval(), (inputs().bfloat16(),))
    calibration = recast.calibrate(program, [inputs(8, 16).bfloat16()])
    smaller = recast.rewrite(program, planned(program, "nystrom(0.5)", calibration))
    assert {w.dtype for w in smaller.weights.values()} == {torch.bfloat16}
    assert smaller(inputs().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["eager", "onnx"])
def test_lowered_and_kept(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = recast.capture(Blocks(Gated(), Packed()).eval(), (inputs().float(),))
    calibration = recast.calibrate(program, [inputs(8, 16).float()])
    recipe = {"default": "int8", "rules": [{"match": "*", "kind": "mlp", "form": "nystrom(0.75)"}]}
    smaller = recast.rewrite(program, planned(program, recipe, calibration))
    artifact = recast.lower(smaller, target)
    artifact.save(tmp_path / "kept")
    again = recast.load(tmp_path / "kept")
    for x in (inputs(3, 5).float(), inputs(1, KEPT).float()):
        assert_close(again(x), smaller(x), terms=WIDTH, factor=1e3)


# ------------------------------------------------------------------ refusals


def test_without_statistics_and_against_a_budget() -> None:
    program, calibration = captured(Plain())
    with pytest.raises(FormError, match=r"is fitted to what flows through it; pass statistics, recast.plan"):
        planned(program, "nystrom(0.75)", None)
    with pytest.raises(PlanError, match="a form of a whole block, and a budget chooses for each matrix by itself"):
        planned(program, {"default": "nystrom(0.75)", "budget": 0.5}, calibration)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nystrom(0)", r"ratio is 0.0, not in \(0, 1\]; 0.75 would keep three quarters"),
        ("nystrom(1.5)", "ratio is 1.5"),
        ("nystrom(0.5, round_to=0)", "round_to is 0, not positive"),
        ("nystrom(0.5, ridge=-1.0)", "ridge is -1.0, not a number from 0"),
        ("nystrom(0.5) | int8", "leaves no dense factor for '| int8' to refit"),
        ("int8 | nystrom(0.5)", "would leave every factor as it is"),
        ("nystrm(0.5)", "nystrom"),
    ],
)
def test_wrong_parameters(text: str, message: str) -> None:
    with pytest.raises(FormError, match=message):
        Form.parse(text)


def test_it_is_no_form_of_a_matrix() -> None:
    assert "nystrom" not in forms()
    assert module_forms()["nystrom"].site_kind == "mlp"
    form = Form.parse("nystrom(0.75) + int8")
    with pytest.raises(FormError, match="is one matrix, and this a form of a whole feed-forward block"):
        form.fit(torch.randn(8, 8))
    with pytest.raises(
        RecipeError, match=r"'nystrom\(ratio=0.5\)', a form of kind mlp, to sites of kind linear; kind: mlp"
    ):
        recast.Recipe.of({"rules": [{"match": "*", "kind": "linear", "form": "nystrom(0.5)"}]})
    with pytest.raises(RecipeError, match="'int8', a form of kind linear, to sites of kind mlp"):
        recast.Recipe.of({"rules": [{"match": "*", "kind": "mlp", "form": "int8"}]})


class ReadTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h) + h.mean(-1, keepdim=True)


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x))))


class Scaled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.scale)


class Tied(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))) + self.up.weight.sum(0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Normed, "stands in the way and reads all features"),
        (Scaled, "'scale' holds a number for each feature, which 'mul"),
        (Tied, "'up' cannot be made anew: its weight 'up.weight' is also read by"),
    ],
)
def test_what_cannot_be_followed_stays_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    program, calibration = captured(make())
    decided = planned(program, "nystrom(0.75)", calibration)
    assert not decided.entries
    assert any(s.name == "up+down" and reason in s.reason for s in decided.skipped), decided.skipped
    changed = Plan.parse(str(decided).replace("sites: {}", "sites: {up+down: {form: nystrom(0.75)}}"))
    with pytest.raises(PlanError, match=r"'up\+down' cannot become nystrom\(ratio=0.75\): "):
        recast.rewrite(program, changed, calibration=calibration)


def test_left_alone_by_the_recipe() -> None:
    program, calibration = captured(Blocks(Gated(), Plain()))
    recipe = {
        "default": "nystrom(0.75)",
        "rules": [{"match": "layers.1", "kind": "mlp", "form": "dense"}],
        "exclude": ["*.gate"],
    }
    decided = planned(program, recipe, calibration)
    assert not decided.entries
    assert ("layers.0", "'layers.0.gate' is excluded by '*.gate'") in [(s.name, s.reason) for s in decided.skipped]
    all_of_it = planned(
        program, {"rules": [{"match": "*.1", "form": "nystrom(1.0)"}, {"match": "x", "form": "int8"}]}, calibration
    )
    assert next((s.name, s.reason) for s in all_of_it.skipped) == (
        "layers.1", f"nystrom(ratio=1.0): all of its inner width, {HIDDEN}, would be kept; allow_larger overrides",
    )  # fmt: skip
    assert len(all_of_it.notes) == 1
    assert "rule 'x' matches no site" in all_of_it.notes[0]


def test_a_block_of_another_name_and_another_kind() -> None:
    program, calibration = captured(Blocks(Gated()))
    decided = planned(program, "nystrom(0.75)", calibration)
    with pytest.raises(PlanError, match=r"there is no block 'layers\.7' in"):
        recast.rewrite(program, Plan.parse(str(decided).replace("layers.0:", "layers.7:")), calibration=calibration)


def test_few_tokens_are_told_of() -> None:
    program, _ = captured(Blocks(Plain()))
    decided = planned(program, "nystrom(0.75)", recast.calibrate(program, [inputs(1, 9)], progress=False))
    assert any("1 of 1 sites saw fewer vectors than they have inputs (layers.0" in note for note in decided.notes)
    assert recast.rewrite(program, decided)(inputs()).isfinite().all()


def test_verification_compares_blocks_with_their_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from recast.passes.modules import apply

    torch.manual_seed(0)
    program, calibration = captured(Blocks(Gated()))
    decided = planned(program, "nystrom(0.75)", calibration)
    fitted = apply._fitted
    monkeypatch.setattr(apply, "_fitted", lambda edit, how, value, old: fitted(edit, how, value * 1.001, old))
    with pytest.raises(VerificationError, match=r"block 'layers.0' computes something else than it was fitted to"):
        recast.rewrite(program, decided)


def test_statistics_of_the_smaller_model_are_those_gathered_on_it() -> None:
    from recast.passes.modules.apply import make_smaller

    torch.manual_seed(0)
    program, calibration = captured(Blocks(Gated()))
    decided = planned(program, "nystrom(0.75)", calibration)
    smaller = make_smaller(program, decided.entries, calibration)
    assert smaller.calibration is not None
    smaller.calibration.check(smaller.program)
    gathered = recast.calibrate(smaller.program, [inputs(8, 16, s) for s in range(2, 6)], progress=False)
    for name in ("layers.0.gate", "layers.0.up", "layers.0.down"):
        mine, theirs = smaller.calibration.of(name), gathered.of(name)
        assert isinstance(mine, Stats)
        assert_close(mine.gram, theirs.gram, terms=512)
        assert_close(mine.mean, theirs.mean, terms=512)
