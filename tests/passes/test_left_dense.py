"""What stays dense is told once and with its reason: in edited plans, in parts of packed weights, in blocks made smaller."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.calibrate import Calibration
from recast.passes.plan import Plan
from recast.passes.report import Report
from recast.patterns.errors import PlanError
from recast.patterns.program import Program

CACHE = OperatorCache(None)
UNNAMED = "the plan does not name it"


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(60, 180), nn.Linear(60, 63)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 15).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 60))


@pytest.fixture(scope="module")
def packed() -> Program:
    torch.manual_seed(0)
    return recast.capture(Packed().eval(), (torch.randn(2, 5, 60),))


@pytest.fixture(scope="module")
def mlp() -> tuple[Program, Calibration]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(63, 60), nn.ReLU(), nn.Linear(60, 33), nn.LayerNorm(33), nn.Linear(33, 3)).eval()
    program = recast.capture(model, (torch.randn(4, 63),))
    return program, recast.calibrate(program, [torch.randn(90, 63) for _ in range(3)])


def reported(program: Program, text: str, calibration: Calibration | None = None) -> Report:
    return recast.rewrite(program, Plan.parse(text), calibration=calibration, cache=CACHE, pictures=False).report


def dense(report: Report) -> dict[str, str]:
    """Reasons by name; every name once, and none that was rewritten."""
    names = [skip.name for skip in report.skipped]
    assert len(set(names)) == len(names)
    assert not set(names) & {row.name for row in report.rows}
    assert not set(names) & {part for row in report.rows for part in row.parts}
    return {skip.name: skip.reason for skip in report.skipped}


def test_sites_that_a_plan_does_not_name(packed: Program) -> None:
    data = yaml.safe_load(str(recast.plan(packed, "int8", cache=CACHE)))
    assert not data["skipped"]
    del data["sites"]["out"]
    assert dense(reported(packed, yaml.safe_dump(data))) == {"out": UNNAMED}
    assert dense(reported(packed, "sites: {}")) == {"qkv": UNNAMED, "out": UNNAMED}
    assert dense(reported(packed, "sites: {qkv.v: int8, out: int8}")) == {"qkv.q": UNNAMED, "qkv.k": UNNAMED}
    told = "sites: {qkv.v: int8}\nskipped: [{name: qkv.k, reason: because}, {name: out, reason: too}]"
    assert dense(reported(packed, told)) == {"qkv.k": "because", "out": "too", "qkv.q": UNNAMED}
    assert dense(reported(packed, "sites: {}\nskipped: [{name: qkv.k, reason: because}]")) == {
        "qkv.k": "because", "qkv.q": UNNAMED, "qkv.v": UNNAMED, "out": UNNAMED,
    }  # fmt: skip


def test_a_site_that_was_skipped_and_is_added(packed: Program, tmp_path: Path) -> None:
    plan = recast.plan(packed, {"rules": [{"match": "out", "form": "int8"}]}, cache=CACHE)
    reason = "left dense by the recipe (default)"
    assert [(s.name, s.reason) for s in plan.skipped] == [("qkv", reason)]
    data = yaml.safe_load(str(plan))
    data["sites"]["qkv"] = "int4"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert list(loaded.entries) == ["out", "qkv"]
    assert not loaded.skipped
    assert dense(reported(packed, yaml.safe_dump(data))) == {}
    # The same on a plan in memory, and where one of the two is a part of the other.
    plan.entries["qkv"] = loaded.entries["qkv"]
    assert dense(recast.rewrite(packed, plan, cache=CACHE, pictures=False).report) == {}
    part = "sites: {qkv.q: int8, out: int8}\nskipped: [{name: qkv, reason: because}]"
    assert dense(reported(packed, part)) == {"qkv.k": "because", "qkv.v": "because"}
    assert dense(reported(packed, "sites: {qkv: int8, out: int8}\nskipped: [{name: qkv.q, reason: because}]")) == {}


def test_parts_of_a_block_are_not_left_dense(mlp: tuple[Program, Calibration]) -> None:
    program, calibration = mlp
    plan = recast.plan(program, "nystrom(0.5)", calibration, cache=CACHE)
    assert list(plan.entries) == ["0+2"]
    assert [s.name for s in plan.skipped] == ["4"]
    report = recast.rewrite(program, plan, cache=CACHE, pictures=False).report
    assert dense(report) == {"4": "left dense by the recipe (default)"}
    # Added by hand, where the plan has its parts among what stays dense.
    other = recast.plan(program, {"rules": [{"match": "4", "form": "int8"}]}, calibration, cache=CACHE)
    assert [s.name for s in other.skipped] == ["0", "2"]
    data = yaml.safe_load(str(other))
    data["sites"]["0+2"] = "nystrom(0.5)"
    assert dense(reported(program, yaml.safe_dump(data), calibration)) == {}


def test_a_form_that_a_part_of_a_block_does_not_get_is_told(mlp: tuple[Program, Calibration]) -> None:
    program, calibration = mlp
    recipe = {"default": "nystrom(0.5)", "rules": [{"match": "2", "form": "low_rank(rank=29)"}]}
    plan = recast.plan(program, recipe, calibration, cache=CACHE)
    assert list(plan.entries) == ["0+2"]
    assert any(
        note.startswith("2: made smaller within '0+2' and nothing more: low_rank(rank=29) would not pay: ")
        for note in plan.notes
    )
    assert dense(recast.rewrite(program, plan, cache=CACHE, pictures=False).report).keys() == {"4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: abc", "has no 'sites': a mapping with 'model' and 'sites' is needed, .* 'sites: {}' none"),
        ("", "is not a plan, it holds nothing: a mapping"),
        ("sites: 3", "'sites' in 'plan' must be a mapping from names to forms, .* not the int 3"),
        ("sites: {}\nmodel: 12", "'model' in 'plan' must be text as .* digits in quotes, not the int 12; it may be left out"),
        ("sites: {}\nmodel: 2024-13-99", "not valid YAML"),
        ("sites: {}\nstatistics: [a]", "'statistics' in 'plan' must be text"),
        ("sites: {}\ncompute_dtype: [bf16]", r"'compute_dtype' in 'plan' must be text such as bf16, not a list \['bf16'\]"),
        ("sites: {}\nversion: true", "is of version True"),
        ("sites: {}\nrecipe: int8", "'recipe' in 'plan' must be a mapping, not the text 'int8'"),
        ("sites: {}\nskipped: 3", "'skipped' in 'plan' must be a list of name and reason, not the int 3"),
        ("sites: {}\nnotes: word", "'notes' in 'plan' must be a list of lines, not the text 'word'"),
        ("sites: {}\ncoverage: .nan", "coverage in 'plan' must be a number, not nan"),
        ("sites: {a: {form: int8, bytes_after: .inf}}", "bytes_after of site 'a' in 'plan' must be a number, not inf"),
        ("sites: {a: {form: [int8]}}", "form of site 'a' in 'plan' must be text such as int8, not a list"),
        ("sites: {a: {form: }}", "form of site 'a' in 'plan' must be text such as int8, not nothing"),
        ("sites: {0: int8, '0': int4}", "site '0' is there twice"),
    ],
)  # fmt: skip
def test_values_of_another_kind(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse(text)
