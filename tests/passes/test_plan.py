"""Plans: text one can read, edit and apply again; parts, budgets, refusals; and what a rewrite reports of them."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import recast
from recast.passes.allocate import allocate
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.plan import Plan
from recast.patterns.errors import CoverageError, FormError, PlanError, WeightError
from recast.patterns.program import Program

CACHE = OperatorCache(None)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.a_b, self.a = nn.Linear(32, 32), nn.ModuleDict({"b": nn.Linear(32, 32)})
        self.small = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        # Interleaved as in GPT-NeoX: each head's q, k and v side by side.
        q, k, v = self.qkv(x).view(b, t, 4, 24).transpose(1, 2).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 32)
        return self.small(self.a["b"](self.a_b(self.out(h)).relu()))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return recast.capture(Model().eval(), (torch.randn(2, 4, 32),))


@pytest.fixture(scope="module")
def calibration(program: Program) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return recast.calibrate(program, [torch.randn(4, 16, 32, generator=generator) for _ in range(3)])


@pytest.fixture(scope="module")
def plan(program: Program, calibration: Calibration) -> Plan:
    return recast.plan(program, "int8", calibration, cache=CACHE)


def test_what_is_decided(plan: Plan, program: Program) -> None:
    assert list(plan.entries) == ["qkv", "out", "a_b", "a.b", "small"]
    entry = plan.entries["qkv"]
    assert (entry.bytes_before, entry.flops_before) == (96 * 32 * 4, 2 * 96 * 32)
    assert entry.bytes_after < entry.bytes_before / 3
    assert 0 < entry.predicted_error < 0.02
    assert plan.coverage == 1.0
    assert not plan.skipped


def test_text_is_read_back(plan: Plan, tmp_path: Path) -> None:
    again = Plan.parse(str(plan))
    assert str(again) == str(plan)
    assert again.entries.keys() == plan.entries.keys()
    file = tmp_path / "plan.yaml"
    plan.save(file)
    assert str(Plan.load(file)) == str(plan)
    assert yaml.safe_load(file.read_text())["sites"]["qkv"]["form"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_edited_and_applied_again(plan: Plan, program: Program, calibration: Calibration) -> None:
    """Forms may be changed by hand; what the old ones predicted is then of no account."""
    data = yaml.safe_load(str(plan))
    data["sites"]["out"]["form"] = "int4(group=16)"
    data["sites"]["small"] = "low_rank(rank=1)"
    del data["sites"]["a_b"]
    del data["skipped"]
    edited = Plan.parse(yaml.safe_dump(data))
    result = recast.rewrite(program, edited, calibration=calibration, cache=CACHE)
    rows = {r.name: r for r in result.report.rows}
    assert {n: r.form for n, r in rows.items()} == {
        "qkv": "int8",
        "out": "int4(group=16)",
        "a.b": "int8",
        "small": "low_rank(rank=1)",
    }
    for row in rows.values():
        assert row.measured_error is not None
        assert 0.5 * row.predicted_error < row.measured_error < 2 * row.predicted_error
    assert rows["out"].predicted_error > 3 * plan.entries["out"].predicted_error


def test_report_predicts_what_it_measures(plan: Plan, program: Program) -> None:
    result = recast.rewrite(program, plan, cache=CACHE)
    report = result.report.to_dict()
    assert [r["name"] for r in report["sites"]] == list(plan.entries)
    for row in report["sites"]:
        assert row["measured_error"] == pytest.approx(row["predicted_error"], rel=0.3)
        assert row["predicted_error"] == pytest.approx(plan.entries[row["name"]].predicted_error)
    assert report["bytes"]["before"] == program.nbytes()
    assert report["bytes"]["after"] == result.nbytes() < program.nbytes() / 2
    assert list(report["passes"]) == ["raise_sites", "apply_forms"]
    assert [p["soundness"] for p in report["passes"].values()] == ["exact", "lossy"]
    assert all(p["verified"] for p in report["passes"].values())
    assert report["whole_model"]["output 0"]["mean_cosine"] > 0.999
    assert not set(result.weights) & {"qkv.weight", "out.weight"}


def test_names_that_look_alike_stay_apart(program: Program) -> None:
    """``a.b`` and ``a_b`` once shared one place for their operators."""
    result = recast.rewrite(program, recast.plan(program, "int8", cache=CACHE), cache=CACHE)
    modules = [result.module.get_submodule(str(n.target)) for n in result.graph.find_nodes(op="call_module")]
    assert len({id(m) for m in modules}) == 5
    assert {m.site for m in modules} == {"qkv", "out", "a_b", "a.b", "small"}


# Parts of packed weights.


def test_parts_take_forms_of_their_own(program: Program) -> None:
    site = next(s for s in recast.find(program) if s.name == "qkv")
    assert [(p.name, p.size) for p in site.parts] == [("q", 32), ("k", 32), ("v", 32)]
    assert site.parts[0].rows == ((0, 8), (24, 32), (48, 56), (72, 80))
    rules = [{"match": "qkv.q", "form": "low_rank(rank=3)"}, {"match": "qkv.k", "form": "int8"}]
    plan = recast.plan(program, {"rules": rules}, cache=CACHE)
    assert {n: str(e.form) for n, e in plan.entries.items()} == {"qkv.q": "low_rank(rank=3)", "qkv.k": "int8"}
    result = recast.rewrite(program, plan, cache=CACHE)
    (node,) = result.graph.find_nodes(op="call_module")
    module = result.module.get_submodule(str(node.target))
    dense = module.operator.to_dense()[module.order]
    weight = program.weights["qkv.weight"].detach()
    rows = {p.name: torch.cat([torch.arange(a, b) for a, b in p.rows]) for p in site.parts}
    assert torch.equal(dense[rows["v"]], weight[rows["v"]])
    assert int(torch.linalg.matrix_rank(dense[rows["q"]], rtol=1e-4)) == 3
    assert 0 < float((dense[rows["k"]] - weight[rows["k"]]).abs().max()) < 0.01
    copy = Model()
    copy.load_state_dict({n: w.detach() for n, w in program.weights.items()})
    copy.qkv.weight.data.copy_(dense)
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(result(x), copy(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"default": "int8", "exclude": ["qkv.q"]}, {"qkv.k": "int8", "qkv.v": "int8"}),
        ({"default": "int8", "rules": [{"match": "qkv.v", "form": "dense"}]}, {"qkv.q": "int8", "qkv.k": "int8"}),
        (
            {"rules": [{"match": "qkv.q", "form": "dense"}, {"match": "qkv", "form": "int8"}]},
            {"qkv.k": "int8", "qkv.v": "int8"},
        ),
        ({"rules": [{"match": "qkv", "form": "int8"}, {"match": "qkv.q", "form": "dense"}]}, {"qkv": "int8"}),
        ({"rules": [{"match": "q*", "form": "int8"}]}, {"qkv": "int8"}),
    ],
)
def test_rules_and_exclusions_reach_parts(
    program: Program, recipe: dict[str, object], expected: dict[str, str]
) -> None:
    plan = recast.plan(program, recipe, cache=CACHE)
    assert {n: str(e.form) for n, e in plan.entries.items() if n.startswith("qkv")} == expected


# What is left out says so.


def test_skipped_sites_say_why(program: Program) -> None:
    recipe = {
        "rules": [{"match": "out", "form": "low_rank(rank=30)"}, {"match": "ouch", "form": "int8"}, {"match": "a_b", "form": "dense"}],
        "exclude": ["small", "nothing.*"],
    }  # fmt: skip
    first = recast.plan(program, recipe, cache=CACHE)
    reasons = {s.name: s.reason for s in first.skipped}
    assert reasons["out"].startswith("low_rank(rank=30) would not pay: ")
    assert "allow_larger overrides" in reasons["out"]
    assert reasons["a_b"] == "dense by the recipe (rule 'a_b')"
    assert reasons["small"] == "excluded by 'small'"
    assert reasons["qkv"] == "left dense by the recipe (default)"
    # Lines that no site answers to are no sites left dense: they would be counted as such.
    assert not any("ouch" in name or "nothing" in name for name in reasons)
    assert first.notes[0].startswith("recipe: rule 'ouch' matches no site; did you mean 'out'?")
    assert first.notes[1].startswith("recipe: exclude 'nothing.*' matches no site")
    report = recast.rewrite(program, first, cache=CACHE, pictures=False).report
    assert report.notes == first.notes
    plan = recast.plan(program, {**recipe, "exclude": [], "allow_larger": True}, cache=CACHE)
    assert "out" in plan.entries


def test_too_little_coverage_fails() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).transpose(1, 2))

    program = recast.capture(Half().eval(), (torch.randn(2, 8, 9),))
    assert recast.plan(program, {"default": "int8", "min_coverage": 0.2}, cache=CACHE).coverage == 0.25
    with pytest.raises(
        CoverageError, match=r"90.0% .* must be matched, 25.0% are; not matched:\n  conv.weight .*kernel of 3"
    ):
        recast.plan(program, {"default": "int8", "min_coverage": "90%"}, cache=CACHE)


def test_unusable_weights_and_forms_name_the_place(program: Program) -> None:
    with pytest.raises(FormError, match=r"5 .*at qkv"):
        recast.plan(program, "block_diagonal(5)", cache=CACHE)
    broken = program.copy()
    broken.module.out.weight = nn.Parameter(program.weights["out.weight"].detach().clone().fill_(torch.nan))
    with pytest.raises(WeightError, match="out"):
        recast.plan(broken, "int8", cache=OperatorCache(None))


# Budgets.


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_there_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.rand(3, generator=generator).tolist() for _ in range(5)]
    costs = [torch.randint(1, 20, (3,), generator=generator).tolist() for _ in range(5)]
    for budget in (5, 20, 35, 60, 200):
        best = min(
            (sum(errors[i][p] for i, p in enumerate(picks)) for picks in itertools.product(range(3), repeat=5)
             if sum(costs[i][p] for i, p in enumerate(picks)) <= budget), default=None,
        )  # fmt: skip
        found = allocate(errors, costs, budget)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert sum(costs[i][p] for i, p in enumerate(found)) <= budget
            assert sum(errors[i][p] for i, p in enumerate(found)) == pytest.approx(best)


def test_budget_is_kept_and_candidates_that_do_not_fit_are_left_out(program: Program, calibration: Calibration) -> None:
    recipe = {"budget": 0.3, "candidates": ["int8", "int4(group=16)", "block_diagonal(4)", "low_rank(ratio=0.2)"]}
    plan = recast.plan(program, recipe, calibration, cache=CACHE)
    kept = [s for s in recast.find(program, "linear") if s.name not in plan.entries]
    used = sum(e.bytes_after for e in plan.entries.values()) + sum(s.parameters * 4 for s in kept)
    assert used <= 0.3 * sum(s.parameters * 4 for s in recast.find(program, "linear"))
    assert plan.entries
    loose = recast.plan(program, {**recipe, "budget": 1}, calibration, cache=CACHE)
    assert not loose.entries
    with pytest.raises(PlanError, match=r"a budget of 1% of .* cannot be met: the smallest candidates take"):
        recast.plan(program, {**recipe, "budget": 0.01}, calibration, cache=CACHE)


@pytest.mark.parametrize("seldom", ["first", "second"])
def test_a_budget_spends_more_where_more_tokens_pass(seldom: str) -> None:
    class Seldom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one = x[:, :1]
            return self.first(one if seldom == "first" else x), self.second(one if seldom == "second" else x)

    torch.manual_seed(0)
    program = recast.capture(Seldom().eval(), (torch.randn(2, 12, 64),))
    calibration = recast.calibrate(program, [torch.randn(16, 12, 64)])
    recipe = {"budget": 0.22, "candidates": ["int8", "int4(group=64)"]}
    plan = recast.plan(program, recipe, calibration, cache=OperatorCache(None))
    forms = {name: str(entry.form) for name, entry in plan.entries.items()}
    assert forms == {name: "int4(group=64)" if name == seldom else "int8" for name in ("first", "second")}


# Plans that cannot be.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- int8", "is not a plan"),
        ("sites: [int8]", "'sites' in .* must be a mapping from names to forms"),
        ("sites: {}\nmodle: x", "unknown key 'modle' .* did you mean 'model'"),
        ("sites: {}\nversion: 2", "is of version 2; this recast reads version 1"),
        ("sites: {}\ncompute_dtype: bf1", "did you mean 'bf16'"),
        ("sites: {out: {}}", "site 'out' .* has no form; write"),
        ("sites: {out: {form: int9}}", "site 'out' in"),
        ("sites: {out: {form: int8, bytes: 3}}", "unknown key 'bytes' at site 'out'"),
        (
            "sites: {out: {form: int8, bytes_after: many}}",
            "bytes_after of site 'out' in .* must be a number, not 'many'",
        ),
        ("sites: {}\nskipped: [out]", "'skipped' in .* must be a list of name and reason"),
        ("sites: {}\ncoverage: all", "coverage in .* must be a number"),
    ],
)
def test_text_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(text)


def test_plans_that_do_not_belong(program: Program, plan: Plan, calibration: Calibration) -> None:
    def attempt(text: str, **options: object) -> None:
        recast.rewrite(program, Plan.parse(text), cache=CACHE, **options)  # type: ignore[arg-type]

    with pytest.raises(PlanError, match="no site 'outt' in Model; did you mean 'out'"):
        attempt("sites: {outt: int8}")
    with pytest.raises(PlanError, match=r"'qkv' is planned as a whole and in parts \(qkv.q\)"):
        attempt("sites: {qkv: int8, qkv.q: int8}")
    with pytest.raises(PlanError, match="was made for model 0123, this is"):
        attempt("model: '0123'\nsites: {out: int8}")
    with pytest.raises(PlanError, match="is not at hand; pass it"):
        attempt(str(plan))
    other = recast.calibrate(program, [torch.randn(2, 3, 32)])
    with pytest.raises(PlanError, match=r"was made with calibration .* was given"):
        attempt(str(plan), calibration=other)
    attempt(str(dataclasses.replace(plan, statistics=None)), calibration=other, pictures=False)


def test_a_plan_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.yaml")


def test_an_empty_plan_gives_a_copy(program: Program) -> None:
    result = recast.rewrite(program, Plan.parse("sites: {}"))
    assert result is not program
    assert str(result) == str(program)
    assert result.report.rows == []


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("int4(rounding='gptq')", "rounds to nearest"),
        ("low_rank(2) | int8(rounding='quantease')", "rounds to nearest"),
        ("awq", "without looking for scales"),
        ("sparse24(method='wanda')", "prunes by magnitude"),
        ("llm_int8", "takes no input for large"),
        ("asvd(0.5)", "plain truncated SVD"),
        ("int4", None),
        ("low_rank(0.5)", None),
    ],
)
def test_forms_that_miss_their_data_are_told(
    form: str, told: str | None, program: Program, calibration: Calibration
) -> None:
    notes = recast.plan(program, form).notes
    assert [told in note for note in notes if "no statistics" in note] == ([True] if told else [])
    assert not any("no statistics" in note for note in recast.plan(program, form, calibration).notes)
