"""Statistics of fewer vectors than features: what fits see of them, and that the plan says so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form, Stats, relative_error
from recast.passes.plan import Plan
from tests.helpers import assert_close


def inputs(tokens: int, n: int, seed: int) -> Tensor:
    """Correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(n)
    mix = torch.randn(n, n, generator=fixed, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    size = torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n, generator=fixed)]
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix.T * size


@pytest.mark.parametrize("tokens", [1, 2, 20, 39])
def test_shrinkage_is_the_published_one(tokens: int) -> None:
    x = inputs(tokens, 40, seed=1)
    x[:, 7] = 0
    scaled = np.delete(x.numpy(), 7, 1)
    scaled = scaled / np.sqrt((scaled**2).mean(0))
    s = scaled.T @ scaled / tokens
    p = 39
    squares, trace = (s @ s).trace(), s.trace()
    above, below = (1 - 2 / p) * squares + trace**2, (tokens + 1 - 2 / p) * (squares - trace**2 / p)
    stats = Stats.from_inputs(x)
    assert stats.shrinkage == pytest.approx(min(1.0, above / below), rel=1e-9)
    regular = stats.regular.gram
    assert stats.gram is not None
    assert regular is not None
    share = stats.shrinkage
    assert_close(regular, (1 - share) * stats.gram + share * torch.diag(stats.gram.diagonal()), terms=1)
    # Every direction counts, but for the input that is always zero.
    live = [i for i in range(40) if i != 7]
    values = torch.linalg.eigvalsh(
        regular[live][:, live] / regular.diagonal()[live].sqrt().outer(regular.diagonal()[live].sqrt())
    )
    assert float(values[0]) > 0.9 * share
    assert not regular[7].any()


def test_enough_vectors_are_left_as_they_are() -> None:
    stats = Stats.from_inputs(inputs(40, 40, seed=1))
    assert not stats.deficient
    assert stats.shrinkage == 0
    assert stats.regular is stats
    cheap = Stats(None, stats.mean, stats.absmax, 3)
    assert cheap.regular is cheap
    zero = Stats.from_inputs(torch.zeros(2, 5)).regular
    assert zero.gram is not None
    assert not zero.gram.any()


@pytest.mark.parametrize("tokens", [12, 48])
@pytest.mark.parametrize("text", ["low_rank(16)", "int3(32, rounding='gptq')", "sparse24", "column_sparse(0.5)"])
def test_fits_hold_better_on_data_they_have_not_seen(text: str, tokens: int) -> None:
    n, form = 96, Form.parse(text)
    weight = torch.randn(64, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held_out = Stats.from_inputs(inputs(2000, n, seed=0))
    raw, regular = [], []
    for seed in (1, 2, 3):
        stats = Stats.from_inputs(inputs(tokens, n, seed))
        for seen, errors in ((stats, raw), (stats.regular, regular)):
            errors.append(relative_error(weight, form.fit(weight, seen), held_out)[1] or 0.0)
    assert 0 < sum(regular) < 0.99 * sum(raw)


@pytest.fixture(scope="module")
def program() -> recast.Program:
    torch.manual_seed(0)
    sizes = [16, 48, 40, 40, 40, 8]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return recast.capture(nn.Sequential(*layers).eval(), (torch.randn(3, 16),))


def test_the_plan_says_which_sites_saw_too_little(program: recast.Program) -> None:
    calibration = recast.calibrate(program, [torch.randn(10, 16), torch.randn(10, 16)])
    plan = recast.plan(program, "low_rank(4)", calibration, cache=OperatorCache(None))
    (note,) = plan.notes
    assert "4 of 5 sites saw fewer vectors than they have inputs (1, 2, 3 and 1 more; at worst 20 for 48)" in note
    assert "48 vectors or more would do" in note
    # It stays with the plan as text, and is told once by the report.
    again = Plan.parse(str(plan))
    assert again.notes == plan.notes
    report = recast.rewrite(program, again, calibration=calibration, cache=OperatorCache(None)).report
    assert report is not None
    assert [n for n in report.notes if n.startswith("calibration")] == plan.notes


def test_nothing_is_said_of_enough_data_or_none(program: recast.Program) -> None:
    calibration = recast.calibrate(program, [torch.randn(48, 16)])
    for seen in (calibration, None):
        plan = recast.plan(program, "low_rank(4)", seen, cache=OperatorCache(None))
        assert plan.notes == []
        assert "notes" not in str(plan)
    # Sites that stay dense need none.
    few = recast.calibrate(program, [torch.randn(20, 16)])
    only = {"rules": [{"match": "0", "form": "low_rank(4)"}]}
    assert recast.plan(program, only, few, cache=OperatorCache(None)).notes == []


def test_the_plan_fits_with_regular_statistics_and_predicts_on_the_data(program: recast.Program) -> None:
    calibration = recast.calibrate(program, [torch.randn(20, 16)])
    cache = OperatorCache(None)
    entry = recast.plan(program, "low_rank(4)", calibration, cache=cache).entries["1"]
    weight = program.weights["1.weight"].detach()
    stats = calibration["1"]
    assert stats.gram is not None
    assert int(torch.linalg.matrix_rank(stats.gram, hermitian=True)) <= 20  # kept as it was gathered
    operator = Form.parse("low_rank(4)").fit(weight, stats.regular)
    assert entry.predicted_error == pytest.approx(relative_error(weight, operator, stats)[1], rel=1e-6)
    exact = Form.parse("low_rank(4)").fit(weight, stats)
    assert (relative_error(weight, exact, stats)[1] or 0) < entry.predicted_error
