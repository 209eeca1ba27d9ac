"""Experts with fewer hidden features: the fit and the smaller mixture against numpy, every dispatch, what is told and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.calibrate import Calibration
from recast.passes.forms import Form, Stats
from recast.passes.forms.registry import module_forms
from recast.passes.modules.camera import energies
from recast.passes.modules.mixture import _in_runs
from recast.passes.plan import Plan
from recast.patterns.errors import FormError, RecipeError, VerificationError
from recast.patterns.program import Program
from tests.helpers import assert_close
from tests.patterns.test_moe import WAYS, Model, define_fallback
from tests.patterns.test_moe import H as FEATURES
from tests.patterns.test_moe import W as INNER

HIDDEN, WIDTH, EXPERTS, KEPT = 36, 20, 3, 15  # the last at a ratio of 0.75
Array = Any


class Mixture(nn.Module):
    """A mixture of transformers' by itself."""

    def __init__(self, family: str, how: str = "grouped_mm") -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        common = {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "experts_implementation": how}
        if family == "mixtral":
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

            config: Any = transformers.MixtralConfig(intermediate_size=WIDTH, num_local_experts=EXPERTS, **common)
        else:
            from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock as Block

            sizes = {"moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 12, "num_experts": EXPERTS}
            config = transformers.Qwen2MoeConfig(**sizes, **common)
        self.mlp = Block(config)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return x + (y[0] if isinstance(y, tuple) else y)


def data(count: int = 4, tokens: int = 30, seed: int = 1, features: int = HIDDEN) -> Tensor:
    """Correlated inputs of unequal size."""
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(count, tokens, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ mix * torch.linspace(0.1, 1, features, dtype=torch.float64) / 4


BATCHES = [data(seed=seed) for seed in range(2, 6)]


def captured(model: nn.Module, batches: list[Tensor] = BATCHES) -> tuple[Program, Calibration]:
    program = recast.capture(model.double().eval().requires_grad_(False), (data(2, 7),))
    return program, recast.calibrate(program, batches, progress=False)


def planned(program: Program, recipe: object, calibration: Calibration | None) -> Plan:
    return recast.plan(program, recipe, calibration, progress=False)


def rewritten(model: nn.Module, recipe: object, batches: list[Tensor] = BATCHES) -> tuple[Program, Program]:
    program, calibration = captured(model, batches)
    return program, recast.rewrite(program, planned(program, recipe, calibration), progress=False)


# ------------------------------------------------------------------ the same in numpy


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def routed(x: Array, router: Array, renormalised: bool) -> tuple[Array, Array]:
    """Numbers and weights of the two experts of each token."""
    p = np.exp(x @ router.T)
    p /= p.sum(1, keepdims=True)
    chosen = np.argsort(-p, 1)[:, :2]
    weights = np.take_along_axis(p, chosen, 1)
    return chosen, weights / weights.sum(1, keepdims=True) if renormalised else weights


def hidden(x: Array, gate_up: Array) -> Array:
    gate, up = np.split(x @ gate_up.T, 2, 1)
    return silu(gate) * up


def smaller_by_hand(model: nn.Module, *, alpha: float, refit: bool, kept: int) -> list[tuple[Array, Array]]:
    """Gate with up, and down, of each expert after it."""
    weights = {n: w.detach().numpy() for n, w in model.mlp.named_parameters()}
    x = torch.cat([b.flatten(0, 1) for b in BATCHES]).numpy()
    chosen, _ = routed(x, weights["gate.weight"], True)
    found = []
    for e in range(EXPERTS):
        gate_up, down = weights["experts.gate_up_proj"][e], weights["experts.down_proj"][e]
        a = hidden(x[(chosen == e).any(1)], gate_up)
        energy = (down**2).sum(0) * ((1 - alpha) * (a**2).sum(0) + alpha * (a**2).max(0))
        best = np.sort(np.argsort(-energy)[:kept])
        solved = np.linalg.lstsq(a[:, best], a @ down.T, rcond=None)[0].T if refit else down[:, best]
        found.append((np.concatenate([gate_up[best], gate_up[WIDTH + best]]), solved))
    return found


def output_by_hand(model: nn.Module, x: Array, experts: list[tuple[Array, Array]]) -> Array:
    weights = {n: w.detach().numpy() for n, w in model.mlp.named_parameters()}
    shared = "shared_expert_gate.weight" in weights
    chosen, shares = routed(x, weights["gate.weight"], not shared)
    y = x.copy()
    for t, (numbers, factors) in enumerate(zip(chosen, shares, strict=True)):
        for e, factor in zip(numbers, factors, strict=True):
            y[t] += factor * (experts[e][1] @ hidden(x[t : t + 1], experts[e][0])[0])
    if shared:
        gate, up, down = (weights[f"shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down"))
        y += (silu(x @ gate.T) * (x @ up.T)) @ down.T / (1 + np.exp(-x @ weights["shared_expert_gate.weight"].T))
    return y


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("family", "how"), [("mixtral", "grouped_mm"), ("mixtral", "batched_mm"), ("qwen2_moe", "grouped_mm")]
)
def test_the_smaller_mixture_computes_what_numpy_does(family: str, how: str, refit: bool) -> None:
    model = Mixture(family, how)
    program, smaller = rewritten(model, f"camera(0.75, alpha=0.6, refit={str(refit).lower()})")
    experts = smaller_by_hand(model, alpha=0.6, refit=refit, kept=KEPT)
    for x in (data(1, 1, seed=20), data(3, 11, seed=21)):  # other numbers of tokens than captured
        expected = output_by_hand(model, x.flatten(0, 1).numpy(), experts)
        # The model's router computes in float32 whatever the others do.
        assert_close(smaller(x).flatten(0, 1).float(), torch.tensor(expected).float())
    assert smaller.weights["mlp.experts.gate_up_proj"].shape == (EXPERTS, 2 * KEPT, HIDDEN)
    assert smaller.weights["mlp.experts.down_proj"].shape == (EXPERTS, HIDDEN, KEPT)
    (row,) = smaller.report.rows
    assert (row.name, row.shape) == ("mlp", (HIDDEN, WIDTH))
    assert row.bytes_before == 8 * EXPERTS * 3 * HIDDEN * WIDTH
    assert row.bytes_after == 8 * EXPERTS * 3 * HIDDEN * KEPT
    assert program.nbytes() - smaller.nbytes() == row.bytes_before - row.bytes_after


def test_what_is_predicted_is_the_error_of_all_experts_outputs() -> None:
    model = Mixture("mixtral")
    _, smaller = rewritten(model, "camera(0.75)")
    experts = smaller_by_hand(model, alpha=0.9, refit=True, kept=KEPT)
    weights = {n: w.detach().numpy() for n, w in model.mlp.named_parameters()}
    x = torch.cat([b.flatten(0, 1) for b in BATCHES]).numpy()
    chosen, _ = routed(x, weights["gate.weight"], True)
    error = size = 0.0
    for e, (gate_up, down) in enumerate(experts):
        mine = x[(chosen == e).any(1)]
        y = hidden(mine, weights["experts.gate_up_proj"][e]) @ weights["experts.down_proj"][e].T
        error += ((hidden(mine, gate_up) @ down.T - y) ** 2).sum()
        size += (y**2).sum()
    (row,) = smaller.report.rows
    assert row.predicted_error == pytest.approx((error / size) ** 0.5, rel=1e-6)
    assert row.measured_error == pytest.approx(row.predicted_error, rel=0.2)


def test_a_whole_model_is_the_smaller_model() -> None:
    """Logits of a language model against those of transformers' own with the smaller width."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(intermediate_size=WIDTH, **sizes)).double().eval()
    batches = [torch.randint(0, 50, (4, 30)) for _ in range(3)]
    program = recast.capture(model, (batches[0][:2, :9],))
    calibration = recast.calibrate(program, batches, progress=False)
    smaller = recast.rewrite(program, planned(program, "camera(0.75)", calibration), progress=False)
    assert [row.name for row in smaller.report.rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    other = MixtralForCausalLM(MixtralConfig(intermediate_size=KEPT, **sizes)).double().eval()
    other.set_experts_implementation("batched_mm")
    other.load_state_dict({n: smaller.weights.get(n, w) for n, w in model.state_dict().items()})
    ids = torch.randint(0, 50, (3, 13))
    found = smaller(ids)
    assert_close(getattr(found, "logits", found).float(), other(ids).logits.float())


# ------------------------------------------------------------------ every way to multiply with experts


@pytest.mark.parametrize("name", WAYS)
def test_every_dispatch(name: str) -> None:
    way = WAYS[name]
    define_fallback()
    model = Model(way).eval().to(torch.float64 if way.double else torch.bfloat16)
    dtype = next(model.parameters()).dtype
    program = recast.capture(model, (torch.randn(2, 5, FEATURES, dtype=dtype),))
    batches = [data(8, 20, seed, FEATURES).to(dtype) for seed in range(3)]
    calibration = recast.calibrate(program, batches, progress=False)
    decided = planned(program, "camera(0.6, round_to=8)", calibration)
    smaller = recast.rewrite(program, decided, progress=False)  # and verified
    assert list(decided.entries) == ["layers.0"]
    last = smaller.weights["layers.0.experts.down_proj"]
    assert sorted(last.shape) == sorted((5, FEATURES, 16))
    x = data(3, 9, 77, FEATURES).to(dtype)
    # What the whole program gives where the features left out are zero, and the last matrices those of the fit.
    plain = recast.rewrite(
        program, planned(program, "camera(0.6, round_to=8, refit=false)", calibration), progress=False
    )
    whole = model.layers[0].experts
    first, kept = whole.gate_up_proj.detach().clone(), plain.weights["layers.0.experts.gate_up_proj"]
    with torch.no_grad():
        for e in range(5):
            rows, left = (first[e], kept[e]) if not way.turned else (first[e].T, kept[e].T)
            mine = (rows[:, None] == left[None]).all(-1).any(1)
            mine = mine[::2] if way.turned else mine[:INNER]  # gate's, in turns with up's or above them
            assert int(mine.sum()) == 16
            (whole.down_proj[e].T if way.turned else whole.down_proj[e])[:, ~mine] = 0
    if dtype == torch.float64:
        assert_close(plain(x), model(x), terms=FEATURES * INNER)
    else:
        assert (plain(x) - model(x)).norm() < 0.02 * model(x).norm()
    assert torch.equal(smaller.weights["layers.0.experts.gate_up_proj"], kept)


# ------------------------------------------------------------------ through the library


def test_forms_of_matrices_follow_on_the_smaller_ones() -> None:
    recipe = {"default": "int8", "rules": [{"match": "*", "kind": "moe", "form": "camera(0.75)"}]}
    program, calibration = captured(Mixture("mixtral"))
    decided = planned(program, recipe, calibration)
    smaller = recast.rewrite(program, decided, progress=False)
    rows = {row.name: row for row in smaller.report.rows}
    assert next(iter(rows)) == "mlp"
    assert rows["mlp.experts.1.down_proj"].shape == (HIDDEN, KEPT)
    assert rows["mlp.experts.2.gate_up_proj"].form == "int8"
    assert all(row.measured_error < 0.5 for row in rows.values())
    assert list(smaller.report.passes) == ["apply_modules", "raise_sites", "apply_forms"]
    again = recast.rewrite(program, Plan.parse(str(decided)), calibration=calibration, progress=False)
    assert torch.equal(again(data()), smaller(data()))


def test_shared_experts_are_feed_forward_blocks() -> None:
    rules = [{"match": "*", "form": "camera(0.75)"}, {"match": "*", "form": "nystrom(0.5)"}]
    program, smaller = rewritten(Mixture("qwen2_moe"), {"rules": rules})
    assert {row.name: row.form for row in smaller.report.rows} == {
        "mlp": "camera(ratio=0.75)", "mlp.shared_expert": "nystrom(ratio=0.5)",
    }  # fmt: skip
    assert smaller.weights["mlp.shared_expert.up_proj.weight"].shape == (6, HIDDEN)
    assert smaller.weights["mlp.experts.down_proj"].shape == (EXPERTS, HIDDEN, KEPT)
    assert (smaller(data()) - program(data())).norm() < 0.5 * (program(data()) - data()).norm()


def test_statistics_of_the_smaller_model_are_those_gathered_on_it() -> None:
    from recast.passes.modules.apply import make_smaller

    program, calibration = captured(Mixture("mixtral"))
    made = make_smaller(program, planned(program, "camera(0.75)", calibration).entries, calibration)
    assert made.calibration is not None
    made.calibration.check(made.program)
    gathered = recast.calibrate(made.program, BATCHES, progress=False)
    for e in range(EXPERTS):
        for name in (f"mlp.experts.{e}.gate_up_proj", f"mlp.experts.{e}.down_proj"):
            mine, theirs = made.calibration.of(name), gathered.of(name)
            assert_close(mine.gram, theirs.gram, terms=512)
            assert_close(mine.absmax, theirs.absmax, terms=HIDDEN)
            assert mine.tokens == theirs.tokens


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_lowered_and_kept(target: str, tmp_path: Path) -> None:
    model = Mixture("mixtral", "batched_mm").float()
    program = recast.capture(model.eval(), (data(2, 7).float(),))
    calibration = recast.calibrate(program, [b.float() for b in BATCHES], progress=False)
    smaller = recast.rewrite(program, planned(program, "camera(0.75)", calibration), progress=False)
    artifact = recast.lower(smaller, target)
    artifact.save(tmp_path / "kept")
    again = recast.load(tmp_path / "kept")
    for x in (data(3, 5).float(), data(1, KEPT).float()):
        assert_close(again(x), smaller(x), terms=HIDDEN, factor=1e3)


def test_everything_kept_is_exact() -> None:
    program, smaller = rewritten(Mixture("mixtral"), {"default": "camera(1)", "allow_larger": True})
    assert [row.predicted_error for row in smaller.report.rows] == [0]
    assert torch.equal(smaller(data()), program(data()))
    decided = planned(*(captured(Mixture("mixtral"))[:1]), "camera(1)", captured(Mixture("mixtral"))[1])
    assert f"all of its inner width, {WIDTH}, would be kept" in decided.skipped[0].reason


def test_least_squares_never_loses_on_the_data() -> None:
    program, calibration = captured(Mixture("mixtral"))
    for ratio in (0.05, 0.3, 0.6, 0.95):
        plain, solved = (
            planned(program, f"camera({ratio}, refit={refit})", calibration).entries["mlp"].predicted_error
            for refit in ("false", "true")
        )
        assert 0 < solved <= plain


def test_an_expert_that_no_token_visits_is_judged_by_its_weights() -> None:
    model = Mixture("mixtral").double()
    with torch.no_grad():  # the last expert repels what the others take in: a direction that all tokens have
        model.mlp.gate.weight.zero_()[:2, 0] = 1.0
        model.mlp.gate.weight[2, 0] = -9.0
    batches = [torch.cat([b[..., :1].abs() + 1, b[..., 1:]], -1) for b in BATCHES]
    program, calibration = captured(model, batches)
    assert "mlp.experts.2.down_proj" not in calibration
    smaller = recast.rewrite(program, planned(program, "camera(0.75)", calibration), progress=False)
    gate_up, down = (program.weights[f"mlp.experts.{n}_proj"][2].numpy() for n in ("gate_up", "down"))
    size = (down**2).sum(0) * (gate_up[:WIDTH] ** 2).sum(1) * (gate_up[WIDTH:] ** 2).sum(1)
    best = np.sort(np.argsort(-size)[:KEPT])
    assert torch.equal(smaller.weights["mlp.experts.down_proj"][2], torch.tensor(down[:, best]))
    expected = torch.tensor(np.concatenate([gate_up[best], gate_up[WIDTH + best]]))
    assert torch.equal(smaller.weights["mlp.experts.gate_up_proj"][2], expected)
    x = data(1, 8)  # which visits it
    assert smaller(-x.abs()).isfinite().all()


def test_few_tokens_are_told_of() -> None:
    program, calibration = captured(Mixture("mixtral"), [data(1, 9)])
    decided = planned(program, "camera(0.75)", calibration)
    assert any("saw fewer vectors than they have inputs (mlp.experts.0.down_proj" in note for note in decided.notes)
    assert recast.rewrite(program, decided, progress=False)(data()).isfinite().all()


def test_verification_compares_experts_with_their_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from recast.passes.modules.place import Place

    program, calibration = captured(Mixture("mixtral"))
    decided = planned(program, "camera(0.75)", calibration)
    sizes = Place.sizes

    def wrong(self: Place, whole: torch.Size, matrix: Tensor) -> list[int]:
        return sizes(self, whole, matrix.mul_(1.001))

    monkeypatch.setattr(Place, "sizes", wrong)
    with pytest.raises(VerificationError, match=r"block 'mlp' computes something else than it was fitted to"):
        recast.rewrite(program, decided, progress=False)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("camera(0)", r"ratio is 0.0, not in \(0, 1\]; 0.75 would keep three quarters"),
        ("camera(0.5, alpha=1.5)", r"alpha is 1.5, not in \[0, 1\]; 0.9 would work"),
        ("camera(0.5, round_to=0)", "round_to is 0, not positive"),
        ("camera(0.5) | int8", "leaves no dense factor for '| int8' to refit"),
    ],
)
def test_wrong_parameters(text: str, message: str) -> None:
    with pytest.raises(FormError, match=message):
        Form.parse(text)


def test_it_is_a_form_of_mixtures() -> None:
    assert module_forms()["camera"].site_kind == "moe"
    with pytest.raises(
        RecipeError, match=r"'camera\(ratio=0.5\)', a form of kind moe, to sites of kind mlp; kind: moe"
    ):
        recast.Recipe.of({"rules": [{"match": "*", "kind": "mlp", "form": "camera(0.5)"}]})
    program, _ = captured(Mixture("mixtral"))
    with pytest.raises(FormError, match=r"'mlp' is fitted to what flows through it; pass statistics"):
        planned(program, "camera(0.75)", None)


class Apart(nn.Module):
    """Experts with linears of their own, which every token enters."""

    def __init__(self, *, bias: bool = True, widths: tuple[int, ...] = (WIDTH,) * EXPERTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, len(widths), bias=False)
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, width, bias=bias) for width in widths)
        self.downs = nn.ModuleList(nn.Linear(width, HIDDEN, bias=bias) for width in widths)

    def between(self, e: int, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = x
        for e, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            mine = ((chosen == e) * weights).sum(-1, keepdim=True)
            y = y + mine * down(self.between(e, torch.relu(up(x))))
        return y


def test_experts_with_linears_of_their_own_and_biases() -> None:
    model = Apart()
    _, smaller = rewritten(model, "camera(0.75, alpha=0, refit=false)")
    x = torch.cat([b.flatten(0, 1) for b in BATCHES])
    with torch.no_grad():
        for up, down in zip(model.ups, model.downs, strict=True):
            energy = torch.relu(up(x)).square().sum(0) * down.weight.square().sum(0)
            down.weight[:, energy.argsort()[: WIDTH - KEPT]] = 0
        assert_close(smaller(data()), model(data()), terms=HIDDEN * WIDTH)
    assert [smaller.weights[f"ups.{e}.bias"].shape for e in range(EXPERTS)] == [(KEPT,)] * EXPERTS
    assert {row.name for row in smaller.report.rows} == {recast.find(captured(Apart())[0], "moe")[0].name}


class Picked(Apart):
    """Matrices and the last biases picked from stacks, one by one."""

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.first = nn.Parameter(torch.stack([up.weight for up in self.ups]))
        self.last = nn.Parameter(torch.stack([down.weight.T for down in self.downs], 1))  # (inner, experts, outer)
        self.offset = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        del self.ups, self.downs

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = x
        for e in range(EXPERTS):
            mine = ((chosen == e) * weights).sum(-1, keepdim=True)
            h = torch.relu(nn.functional.linear(x, self.first[e]))
            y = y + mine * nn.functional.linear(h, self.last[:, e].T, self.offset[e])
        return y


def test_matrices_picked_one_by_one_from_stacks_of_any_order() -> None:
    program, smaller = rewritten(Picked(), "camera(0.75)")
    assert smaller.weights["first"].shape == (EXPERTS, KEPT, HIDDEN)
    assert smaller.weights["last"].shape == (KEPT, EXPERTS, HIDDEN)
    assert torch.equal(smaller.weights["offset"], program.weights["offset"])
    _, apart = rewritten(Apart(bias=False), "camera(0.75)")
    for e in range(EXPERTS):
        assert torch.equal(smaller.weights["first"][e], apart.weights[f"ups.{e}.weight"])
        assert_close(smaller.weights["last"][:, e].T, apart.weights[f"downs.{e}.weight"], terms=480, factor=1e3)


class Scaled(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def between(self, e: int, h: Tensor) -> Tensor:
        return h * self.scale


class Summed(Apart):
    def between(self, e: int, h: Tensor) -> Tensor:
        return h + self.ups[e].weight.sum(1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Scaled, "'scale' holds a number for each feature, which 'mul"),
        (Summed, "'ups.0.weight' is also read by 'add"),
        (lambda: Apart(widths=(WIDTH, 12, WIDTH)), "its experts have inner widths from 12 to 20"),
    ],
)
def test_what_cannot_be_followed_stays_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    program, calibration = captured(make())
    name = recast.find(program, "moe")[0].name
    decided = planned(program, "camera(0.75)", calibration)
    assert not decided.entries
    assert any(s.name == name and reason in s.reason for s in decided.skipped), decided.skipped


def test_experts_may_keep_features_of_their_own_only_where_all_are_treated_alike() -> None:
    wanted = torch.arange(4)
    for whole in ([0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]):
        line = torch.tensor(whole)
        assert _in_runs(line.expand(3, -1), wanted)
        assert _in_runs(line.view(1, -1, 1).expand(4, -1, 8), wanted)
    for part in ([0, 1], [0, 1, 3, 2], [0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3, -1]):
        assert not _in_runs(torch.tensor(part).expand(3, -1), wanted)
    assert not _in_runs(torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]]), wanted)


def test_energies_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 7)), rng.normal(size=(4, 7))
    expected = (w**2).sum(0) * (0.3 * (x**2).sum(0) + 0.7 * (x**2).max(0))
    assert_close(energies(torch.tensor(w), Stats.from_inputs(torch.tensor(x)), 0.7), torch.tensor(expected), terms=50)
