"""GPTQ and QuantEase against exact conditional minimisers and exhaustive search, in numpy and float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from recast.passes.forms import Form, Stats, relative_error
from recast.passes.forms.rounding import gptq, quantease
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def inputs(n: int, tokens: int = 200) -> Tensor:
    return torch.randn(tokens, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)


def error(gap: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("ij,jk,ik->", gap, gram, gap))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("n", [1, 7, 140])
def test_gptq_moves_what_is_left_to_its_exact_optimum(n: int, act_order: bool) -> None:
    weight, x = torch.randn(3, n, dtype=torch.float64), inputs(n, 2 * n + 3)
    gram, step = x.T @ x, 0.25
    found = gptq(weight, gram, lambda j, c: torch.round(c / step) * step, act_order=act_order)
    # Optimal brain surgery by least squares: with the inputs rounded so far held, solve for all others, round the next.
    h = gram.numpy() + 0.01 * np.trace(gram.numpy()) / n * np.eye(n)
    order = np.argsort(-np.diag(gram.numpy()), kind="stable") if act_order else np.arange(n)
    expected = weight.numpy().copy()
    for at, j in enumerate(order):
        done, free = order[:at], order[at:]
        gap = expected[:, done] - weight.numpy()[:, done]
        best = weight.numpy()[:, free] - gap @ h[np.ix_(done, free)] @ np.linalg.inv(h[np.ix_(free, free)])
        expected[:, j] = np.round(best[:, 0] / step) * step
    assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("tokens", [3, 50])
def test_coordinate_descent_ends_between_gptq_and_the_best_there_is(tokens: int) -> None:
    n, step = 5, 0.8
    for seed in range(6):
        torch.manual_seed(seed)
        weight, x = torch.randn(2, n, dtype=torch.float64), inputs(n, tokens)
        gram = x.T @ x
        grid = [step * code for code in (-2, -1, 0, 1)]

        def snap(j: int, column: Tensor) -> Tensor:
            return (torch.round(column / step).clamp(-2, 1)) * step

        first = gptq(weight, gram, snap)
        found = quantease(weight, gram, first, snap)
        values = np.array(list(itertools.product(grid, repeat=n)))
        for row in range(2):
            gaps = weight[row].numpy() - values
            exact = np.einsum("ij,jk,ik->i", gaps, gram.numpy(), gaps).min()
            after, before = (error((weight - v)[row : row + 1].numpy(), gram.numpy()) for v in (found, first))
            assert exact * (1 - 1e-9) <= after <= before * (1 + 1e-9)
        # No single value can be changed for the better.
        if tokens > n:
            for row, j, value in itertools.product(range(2), range(n), grid):
                other = found[row].clone()
                other[j] = value
                gap = (weight[row] - other).numpy()[None]
                kept = (weight[row] - found[row]).numpy()[None]
                assert error(gap, gram.numpy()) >= error(kept, gram.numpy()) * (1 - 1e-9)


@pytest.mark.parametrize("base", ["int4", "int3", "int2", "int8", "nf4"])
def test_roundings_come_in_their_published_order(base: str) -> None:
    weight, x = torch.randn(40, 96), inputs(96, 400)
    stats = Stats.from_inputs(x)
    errors = []
    for rounding in ("nearest", "gptq", "quantease"):
        operator = Form.parse(f"{base}(group=32, rounding='{rounding}')").fit(weight, stats)
        found = relative_error(weight, operator, stats)[1]
        assert found is not None
        errors.append(found)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


def test_scales_chosen_on_the_way_beat_scales_chosen_before() -> None:
    # act_order rounds with the scales of plain rounding; both orders are far better than plain rounding.
    weight, x = torch.randn(64, 128), inputs(128, 500)
    stats = Stats.from_inputs(x)
    texts = ["int3(group=32)", "int3(group=32, rounding='gptq')", "int3(group=32, rounding='gptq', act_order=true)"]
    plain, natural, ordered = (relative_error(weight, Form.parse(t).fit(weight, stats), stats)[1] for t in texts)
    assert plain is not None
    assert natural is not None
    assert ordered is not None
    assert max(natural, ordered) < 0.8 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 50), (33, 50), (300, 7)], ids=str)
def test_awkward_weights_and_data(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[:, 2] = 0
    weight[0, 4:] = 0
    for tokens in (1, shape[1] // 3 + 1, 200):
        x = inputs(shape[1], tokens)
        x[:, 3] = 0  # an input that is never seen
        stats = Stats.from_inputs(x)
        for form in ("int3(group=20, rounding='quantease')", "nf4(group=20, rounding='gptq')"):
            operator = Form.parse(form).fit(weight, stats)
            assert operator.dtype == dtype
            found = relative_error(weight, operator, stats)[1]
            plain = relative_error(weight, Form.parse(form.split("(")[0] + "(group=20)").fit(weight, stats), stats)[1]
            assert found is not None
            assert plain is not None
            assert found <= plain * (1 + 1e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4(rounding='gptp')", "'nearest' or 'gptq' or 'quantease' would work"),
        ("nf4(act_order=true)", "add rounding='gptq'"),
        ("nf4(group=0)", "64 would work"),
        ("int3(group=-1)", "32 would work"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)
