"""ARMOR against brute force, automatic differentiation, and where it starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from recast.passes.forms import (
    BlockDiagonal,
    DirectSum,
    Form,
    Operator,
    Product,
    Quantized,
    Stats,
    armor_alternating,
    relative_error,
)
from recast.passes.forms.armor import Armor
from recast.passes.forms.armor_adam import AdamSearch
from recast.passes.forms.armor_alternating import AlternatingSearch
from recast.passes.forms.armor_fit import ArmorFactors, best_pairs
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.pruning import top_of_groups
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def search(rows: int = 24, columns: int = 16, d: int = 8, **given: object) -> AdamSearch:
    return AdamSearch(*begin(rows, columns, d), columns, **{"rate": 0.0, "greedy": False, "seed": 0, **given})  # type: ignore[arg-type]


def begin(rows: int, columns: int, d: int) -> tuple[Tensor, Tensor, ArmorFactors]:
    """Somewhere in the middle of a search, in float64."""
    target = torch.randn(rows, columns, dtype=torch.float64)
    mask = top_of_groups(torch.rand(rows, columns), 2, 4)
    eye = torch.eye(d, dtype=torch.float64)
    factors = ArmorFactors(
        eye + 0.3 * torch.randn(rows // d, d, d, dtype=torch.float64),
        torch.where(mask, target, 0),
        mask,
        eye + 0.3 * torch.randn(columns // d, d, d, dtype=torch.float64),
    )
    weights = torch.rand(columns, dtype=torch.float64) + 0.1
    return target, weights, factors


def product(factors: ArmorFactors) -> Tensor:
    left, right = (torch.block_diag(*part) for part in (factors.left, factors.right))  # type: ignore[no-untyped-call]
    dense: Tensor = left @ factors.core @ right
    return dense


def loss(search: AdamSearch, factors: ArmorFactors | None = None) -> Tensor:
    gap = product(factors or search.factors) - search.target
    return (gap.square() * search.weights).sum()


def test_a_pair_is_the_brute_force_least_squares_over_all_supports() -> None:
    d, groups = 8, 12
    rng = np.random.default_rng(0)
    for _ in range(groups):
        a, rows = rng.standard_normal(d), rng.standard_normal((4, d))
        rest, weights = rng.standard_normal((d, d)), rng.random(d) + 0.1
        now = np.where(rng.permutation(4) < 2, rng.standard_normal(4), 0)

        def error(v: np.ndarray, a: np.ndarray = a, rows: np.ndarray = rows, rest: np.ndarray = rest) -> float:
            return float(((rest + np.outer(a, v @ rows)) ** 2 * weights).sum())  # noqa: B023

        tried = []
        for pair in itertools.combinations(range(4), 2):
            design = np.stack([np.outer(a, rows[i] * np.sqrt(weights)).reshape(-1) for i in pair], 1)
            found = np.linalg.lstsq(design, -(rest * np.sqrt(weights)).reshape(-1), rcond=None)[0]
            values = np.zeros(4)
            values[list(pair)] = found
            tried.append((error(values), pair, values))
        least, pair, values = min(tried, key=lambda t: t[0])
        linear = torch.from_numpy(rows @ (weights * (a @ rest)))
        quadratic = torch.from_numpy((rows * weights) @ rows.T)
        got, kept, gain = best_pairs(
            linear[None],
            quadratic[None],
            torch.tensor([float(a @ a)]),
            torch.from_numpy(now)[None],
            torch.ones(1, 4, dtype=torch.bool),
        )
        assert kept[0].nonzero().flatten().tolist() == list(pair)
        # The ridge of 1e-9 is far above rounding and far below what matters.
        assert np.allclose(got[0].numpy(), values, atol=1e-6)
        assert np.isclose(float(gain), error(now) - least, rtol=1e-6)


def test_a_pair_is_left_alone_where_nothing_is_better() -> None:
    now = torch.tensor([[0.0, 2.0, 0.0, -1.0]])
    quadratic = torch.eye(4)[None]
    got, _, gain = best_pairs(-now, quadratic, torch.ones(1), now, torch.ones(1, 4, dtype=torch.bool))
    assert torch.allclose(got, now)
    assert float(gain) <= 1e-7
    # No slope, no row of B, nothing there at all: nothing happens.
    none = torch.zeros(1, 4)
    got, _, gain = best_pairs(none, torch.zeros(1, 4, 4), torch.zeros(1), none, torch.zeros(1, 4, dtype=torch.bool))
    assert not got.any()
    assert not gain.any()


@pytest.mark.parametrize("greedy", [False, True])
def test_updates_of_pairs_lower_the_loss_by_what_they_say(greedy: bool) -> None:
    found = search(greedy=greedy)
    losses = [float(loss(found))]
    terms = 62 * 46  # of the sum that a loss is

    for _ in range(60):
        assert_close(f64(found._step()), f64(losses[-1]), terms=terms)
        losses.append(float(loss(found)))
        assert losses[-1] <= losses[-2]
        assert_close(f64(losses[-1] + found.gains[-1]), f64(losses[-2]), terms=terms)
        assert torch.equal(found.factors.core != 0, found.factors.mask)
        assert bool((found.factors.mask.reshape(-1, 4).sum(1) == 2).all())
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_after_an_update_of_pairs_are_those_of_the_loss() -> None:
    found = search()
    found._step()
    parts = [t.clone().requires_grad_() for t in (found.factors.left, found.factors.core, found.factors.right)]
    left, core, right = parts
    expected = torch.autograd.grad(
        loss(found, ArmorFactors(left, core * found.factors.mask, found.factors.mask, right)), parts
    )
    for adam, gradient in zip(found.adam, expected, strict=True):
        assert_close(adam.first * 10, gradient, terms=10**4)  # the first step of a mean with decay 0.9


def test_adam_is_that_of_torch() -> None:
    found = search(rate=1e-2)
    # Held pairs: every choice is refused when there is no gain to be had.
    expected = torch.nn.Parameter(found.factors.left.clone())
    reference = torch.optim.Adam([expected], lr=1e-2)
    for _ in range(5):
        gradient = torch.randn_like(expected)
        expected.grad = gradient
        reference.step()
        found.adam[0].step(gradient)
    assert_close(found.factors.left, expected.detach(), terms=10)


def weight_and_inputs(m: int, n: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(m, n) + 2 * torch.randn(m, 3) @ torch.randn(3, n)
    mix = torch.randn(n, n) * torch.logspace(0, -1, n)
    return weight, torch.randn(300, n) @ mix.T * torch.rand(n).add(0.1)


@pytest.mark.parametrize("how", ["search='alternating'", "rate=1e-3, search='adam'"])
@pytest.mark.parametrize("shape", [(32, 48), (30, 45), (7, 30), (1, 37), (9, 2)], ids=str)
def test_it_begins_where_nowag_ends_and_only_gets_better(shape: tuple[int, int], how: str) -> None:
    weight, x = weight_and_inputs(*shape)
    stats = Stats.from_inputs(x)
    nowag = Form.parse("sparse24('nowag')").solve(weight, stats)
    start = Form.parse("armor(8, 0, polish=false)").solve(weight, stats)
    assert_close(start.to_dense(), nowag.to_dense(), terms=shape[1])
    # The loss of the search, of each input for itself, in the normalised weight.
    columns = weight.norm(dim=0)
    rows = (weight / columns).norm(dim=1)
    scale = x.norm(dim=0) / columns

    def proxy(operator: Operator) -> float:
        return float((((weight - operator.to_dense()) / rows.unsqueeze(1)) * scale).norm())

    searched = Form.parse(f"armor(8, 60, polish=false, {how})").solve(weight, stats)
    rounding = 1e-6 * float((weight / rows.unsqueeze(1) * scale).norm())
    assert proxy(searched) <= proxy(nowag) + rounding
    if min(shape) > 7:
        assert proxy(searched) < 0.9 * proxy(nowag)
    errors = [relative_error(weight, found, stats)[1] or 0.0 for found in (nowag, start)]
    polished = relative_error(weight, Form.parse(f"armor(8, 60, {how})").solve(weight, stats), stats)[1]
    assert polished is not None
    assert polished <= errors[0] + 1e-6
    if min(shape) > 7:
        assert polished < 0.6 * errors[0]  # the gap to the dense weight is closed by 40 percent and more


@pytest.mark.parametrize("how", ["alternating", "adam"])
def test_the_same_seed_gives_the_same_bits(how: str) -> None:
    weight, x = weight_and_inputs(24, 32)
    texts = [f"armor(8, 5, search='{how}'{more})" for more in ("", "", ", seed=1", ", greedy=true")]
    a, b, c, d = (Form.parse(text).solve(weight, Stats.from_inputs(x)).to_dense() for text in texts)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, d)


def f64(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def far(search: AlternatingSearch, target: Tensor, weights: Tensor) -> Tensor:
    return ((product(search.found()) - target).square() * weights).sum()


@pytest.mark.parametrize("greedy", [False, True])
def test_no_round_raises_the_loss(greedy: bool) -> None:
    target, weights, factors = begin(40, 48, 8)
    found = AlternatingSearch(target, weights, factors, 48, rate=0.0, greedy=greedy, seed=0)
    before = far(found, target, weights)
    first = float(before)
    for _ in range(12):
        assert_close(f64(found.advance()), before, terms=10**4)
        after = far(found, target, weights)
        assert float(after) <= float(before) * (1 + 1e-12)
        before = after
        held = found.found()
        assert torch.equal(held.core != 0, held.mask)
        assert bool((held.mask.reshape(-1, 4).sum(1) == 2).all())
    assert float(before) < 0.5 * first
    assert min(found.gains) >= 0


@pytest.mark.parametrize("values", [1, 2**19])
def test_blocks_of_a_and_b_are_least_squares(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(armor_alternating, "_NEAR", 0.0)
    monkeypatch.setattr(armor_alternating, "_VALUES", values)  # a block of columns at a time, or all
    target, weights, factors = begin(24, 48, 8)
    found = AlternatingSearch(target, weights, factors, 48, rate=0.0, greedy=False, seed=0)
    inner = factors.core @ torch.block_diag(*factors.right)  # type: ignore[no-untyped-call]
    root = weights.sqrt()
    found._solve_left()
    for i in range(3):
        own = slice(8 * i, 8 * i + 8)
        best = np.linalg.lstsq((inner[own] * root).T.numpy(), (target[own] * root).T.numpy(), rcond=None)[0].T
        assert_close(found.left[i], torch.from_numpy(best), terms=10**4)
    outer = torch.block_diag(*found.left) @ factors.core  # type: ignore[no-untyped-call]
    for part in found._parts():
        found._solve_right(part)
    for j in range(6):
        own = slice(8 * j, 8 * j + 8)
        best = np.linalg.lstsq(outer[:, own].numpy(), target[:, own].numpy(), rcond=None)[0]
        assert_close(found.right[j], torch.from_numpy(best), terms=10**6)


def test_pairs_gain_what_they_say_and_the_rest_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    target, weights, factors = begin(24, 16, 8)
    found = AlternatingSearch(target, weights, factors, 16, rate=0.0, greedy=False, seed=0)
    gram = found.left.mT @ found.left
    monkeypatch.setattr(armor_alternating, "_STEPS", 0)
    for apart in (8, 2, 1):
        monkeypatch.setattr(armor_alternating, "_APART", apart)
        before = float(far(found, target, weights))
        gained = sum(found._improve(part, gram) for part in found._parts())
        after = float(far(found, target, weights))
        assert_close(f64(before - after), f64(gained), terms=10**5)
        assert gained > 0
    # Conjugate gradients come to the least squares of the values that are kept, tile by tile.
    monkeypatch.setattr(armor_alternating, "_SWEEPS", 0)
    monkeypatch.setattr(armor_alternating, "_STEPS", 400)
    for part in found._parts():
        found._improve(part, gram)
    root = weights.reshape(2, 8).sqrt().numpy()
    for j, i in itertools.product(range(2), range(3)):
        a, b = found.left[i].numpy(), found.right[j].numpy() * root[j]
        kept = found.mask[j, i].numpy()
        columns = np.kron(a, b.T)[:, kept.ravel()]
        aimed = target[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy() * root[j]
        best = np.linalg.lstsq(columns, aimed.ravel(), rcond=None)[0]
        assert_close(found.core[j, i][found.mask[j, i]], torch.from_numpy(best), terms=10**8)


def test_the_exact_steps_find_more_than_adam() -> None:
    target, weights, factors = begin(64, 64, 16)
    adam = AdamSearch(target, weights, factors.copy(), 64, rate=1e-2, greedy=False, seed=0)
    rounds = AlternatingSearch(target, weights, factors.copy(), 64, rate=0.0, greedy=False, seed=0)
    reached = float(loss(adam, adam.run(400)))
    rounds.run(40)
    assert float(far(rounds, target, weights)) < reached


def test_a_weight_that_is_sparse_already_ends_the_search_early() -> None:
    found = search(rate=1e-4)
    found.target.copy_(product(found.factors))
    best = found.run(1000)
    assert len(found.losses) <= 101
    assert float(loss(found, best)) < 1e-20


def test_the_best_factors_seen_are_kept() -> None:
    found = search(rate=30.0)  # far too large
    before = float(loss(found))
    best = found.run(40)
    assert float(loss(found, best)) <= before


def test_what_is_held_and_what_a_pipe_refits() -> None:
    weight, x = weight_and_inputs(20, 28)
    operator = Form.parse("armor(8, 5) | int4(group=4)").fit(weight, Stats.from_inputs(x))
    assert isinstance(operator, Armor)
    assert isinstance(operator.left, DirectSum)
    assert [part.shape for part in operator.left.parts] == [(16, 16), (4, 4)]
    assert isinstance(operator.right, Product)
    core = operator.right.left
    assert isinstance(core, NMSparse)
    assert isinstance(core.values, Quantized)
    assert isinstance(operator.right.right, DirectSum)
    assert all(isinstance(part, BlockDiagonal) for part in (*operator.left.parts, *operator.right.right.parts))
    assert isinstance(operator.to(torch.bfloat16), Armor)
    # Half a byte a value, a scale for four, two bits for each place.
    blocks = 4 * (2 * 64 + 16 + 3 * 64 + 16)
    assert operator.nbytes == blocks + 20 * (7 + 4 * 4 + 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("armor(6)", "block is 6, not a positive multiple of 4; 128 would work"),
        ("armor(0)", "block is 0"),
        ("armor(iterations=-1)", "iterations is -1, negative"),
        ("armor(rate=0)", "rate is 0.0, not positive"),
        ("armor(search='sgd')", "search is 'sgd'; 'alternating' or 'adam' would work"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(FormError) as caught:
        Form.parse(text)
    assert says in str(caught.value)


def test_the_defaults_are_those_of_the_paper() -> None:
    form = Form.parse("armor")
    assert form == Form.parse("armor(block=128, rate=1e-4, greedy=false)")
    # Bytes of a square 4096 in 16 bits: 9/16, and 6.25 percent for the blocks.
    outline = form.outline((4096, 4096), torch.bfloat16)
    assert outline is not None
    assert outline.nbytes == 2 * 4096**2 * (9 / 16 + 1 / 16)
