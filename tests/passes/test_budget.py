"""Budgets: what rules name decides, nothing is chosen that would not pay, and a budget without choices is an error."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.plan import Plan
from recast.passes.recipe import Recipe
from recast.patterns.errors import PlanError, RecipeError
from recast.patterns.program import Program

CACHE = OperatorCache(None)


class Thin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(60, 1), nn.Linear(1, 63)
        self.c, self.z = nn.Linear(63, 577, bias=False), nn.Linear(577, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.c(self.b(self.a(x))).relu())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 64))


@pytest.fixture(scope="module")
def thin() -> tuple[Program, Calibration]:
    torch.manual_seed(0)
    program = recast.capture(Thin().eval(), (torch.randn(4, 60),))
    return program, recast.calibrate(program, [torch.randn(32, 60) for _ in range(3)])


@pytest.fixture(scope="module")
def packed() -> Program:
    torch.manual_seed(0)
    return recast.capture(Packed().eval(), (torch.randn(2, 5, 64),))


@pytest.fixture(scope="module")
def row() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 63)).eval()
    return recast.capture(model, (torch.randn(4, 64),))


def forms(plan: Plan) -> dict[str, str]:
    return {name: str(entry.form) for name, entry in plan.entries.items()}


def used(plan: Plan, program: Program) -> tuple[int, int]:
    """Bytes that a plan's sites take, and that they take dense."""
    sites = {site.name: 4 * site.parameters for site in recast.find(program, "linear")}
    return sum(plan.entries[n].bytes_after if n in plan.entries else size for n, size in sites.items()), sum(
        sites.values()
    )


@pytest.mark.parametrize("first", [False, True])
def test_a_rule_decides_and_the_rest_is_chosen(row: Program, first: bool) -> None:
    rules = [{"match": "2", "form": "int4"}, {"match": "2", "form": "int8"}]
    recipe = {"budget": 0.3, "candidates": ["int8", "low_rank(1)"], "rules": rules[::-1] if first else rules}
    plan = recast.plan(row, recipe, cache=CACHE)
    assert forms(plan)["2"] == ("int8" if first else "int4")
    assert set(forms(plan).values()) - {forms(plan)["2"]} <= {"int8", "low_rank(rank=1)"}
    after, before = used(plan, row)
    assert after <= 0.3 * before
    # What the rule leaves is spent: with less left over, something else has to shrink further.
    tight = recast.plan(row, recipe | {"budget": 0.2, "rules": rules[1:]}, cache=CACHE)
    assert forms(tight)["2"] == "int8"
    assert used(tight, row)[0] <= 0.2 * before
    assert "low_rank(rank=1)" in forms(tight).values()


def test_rules_that_take_more_than_the_budget(row: Program) -> None:
    recipe = {"budget": 0.2, "candidates": ["low_rank(1)"], "rules": [{"match": "[02]", "form": "int8"}]}
    with pytest.raises(
        PlanError,
        match=r"a budget of 20% of 81,664 bytes cannot be met: what rules name takes 17,152 bytes by itself "
        r"\('0' int8 8,704, '2' int8 8,448\), it allows 16,332; give smaller forms in the rules, or raise the budget to",
    ) as caught:
        recast.plan(row, recipe, cache=CACHE)
    raised = float(str(caught.value).rpartition(" ")[2].removesuffix("%")) / 100
    assert forms(recast.plan(row, recipe | {"budget": raised}, cache=CACHE))["0"] == "int8"
    with pytest.raises(PlanError, match=r"the smallest candidates take 21,436 bytes .*, 8,704 of them by rules; add"):
        recast.plan(
            row, {"budget": 0.2, "candidates": ["int8"], "rules": [{"match": "0", "form": "int8"}]}, cache=CACHE
        )


def test_rules_and_exclusions_reach_parts_under_a_budget(packed: Program) -> None:
    choice = {"budget": 0.4, "default": "int8", "candidates": ["low_rank(1)"]}
    ruled = recast.plan(packed, choice | {"rules": [{"match": "qkv.q", "form": "int8"}], "budget": 0.15}, cache=CACHE)
    assert forms(ruled)["qkv.q"] == "int8"
    assert forms(ruled)["qkv.k"] == "low_rank(rank=1)"
    kept = recast.plan(
        packed, {"budget": 0.4, "candidates": ["int8", "low_rank(1)"], "exclude": ["qkv.q"]}, cache=CACHE
    )
    assert {"qkv", "qkv.q"}.isdisjoint(kept.entries)
    assert ("qkv.q", "excluded by 'qkv.q'") in [(s.name, s.reason) for s in kept.skipped]


def test_nothing_is_chosen_that_would_not_pay(thin: tuple[Program, Calibration]) -> None:
    program, calibration = thin
    for share in (0.3, 0.5, 1):
        recipe: dict[str, Any] = {"budget": share, "candidates": ["int8", "int4"]}
        plan = recast.plan(program, recipe, calibration, cache=CACHE)
        assert plan.entries or share == 1
        for entry in plan.entries.values():
            assert entry.bytes_after < entry.bytes_before or entry.flops_after < entry.flops_before
    plan = recast.plan(program, {"budget": 0.5, "candidates": ["int8", "int4"]}, calibration, cache=CACHE)
    (reason,) = (s.reason for s in plan.skipped if s.name == "b")
    assert reason.startswith("int8 would not pay: 315 bytes")
    assert "; int4 would not pay: " in reason
    # Nor by a rule, and what stays dense then counts as dense.
    ruled = recast.plan(
        program, {"budget": 0.5, "default": "int8", "rules": [{"match": "b", "form": "int4"}]}, calibration, cache=CACHE
    )
    assert "b" not in ruled.entries
    assert used(ruled, program)[0] <= 0.5 * used(ruled, program)[1]


def test_dense_is_no_candidate_of_its_own(row: Program) -> None:
    for default in (None, "dense"):
        recipe = {"budget": 0.9, "default": default, "candidates": ["dense", "int8"]}
        assert set(forms(recast.plan(row, recipe, cache=CACHE)).values()) == {"int8"}


def test_the_default_is_a_candidate(row: Program) -> None:
    assert set(forms(recast.plan(row, {"budget": 0.3, "default": "int8"}, cache=CACHE)).values()) == {"int8"}
    assert not recast.plan(row, {"budget": 1, "default": "int8"}, cache=CACHE).entries


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"budget": 0.5}, r"a budget of 50% has nothing to choose from, .* add candidates: \[int8, int4\], or default: int8"),
        ({"budget": 0.305, "candidates": []}, r"a budget of 30.5% has nothing to choose from"),
        ({"budget": 0.5, "default": "dense", "candidates": ["dense"]}, "has nothing to choose from"),
        ({"budget": 0.5, "rules": [{"match": "*", "form": "int8"}]}, "what rules name is not its choice; add candidates"),
        ({"candidates": ["int8", "int4"]}, r"candidates \(int8, int4\) are chosen from under a budget, .* add budget: 0.5"),
        ({"candidates": ["int8"], "default": "int4"}, "and there is none"),
    ],
)  # fmt: skip
def test_a_budget_and_candidates_need_each_other(row: Program, recipe: Mapping[str, Any], message: str) -> None:
    x = torch.randn(4, 64)
    for attempt in (
        Recipe.of(recipe).check,
        lambda: recast.plan(row, recipe, cache=CACHE),
        lambda: recast.optimize(row, recipe=recipe, target="eager", cache=CACHE),
        lambda: recast.calibrate(row, [x], recipe=recipe, cache=CACHE),
    ):
        with pytest.raises(RecipeError, match=message):
            attempt()
