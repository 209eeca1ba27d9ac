"""QuantEase with outliers against its two steps written out in numpy, exhaustive search, and what it starts from."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from recast.passes.forms import Form, Operator, Quantized, Stats, Sum, relative_error
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.quantease_outliers import alternate
from recast.passes.forms.sparse import Sparse
from recast.patterns.errors import FormError
from tests.helpers import assert_close

Array = npt.NDArray[np.float64]


def inputs(n: int, tokens: int = 200) -> Tensor:
    return torch.randn(tokens, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)


def terms(operator: Operator) -> tuple[Quantized, Sparse]:
    assert isinstance(operator, Sum)
    codes, beside = operator.terms
    assert isinstance(codes, Quantized)
    assert isinstance(beside, Sparse)
    return codes, beside


def squared(gap: Array, gram: Array) -> float:
    return float(np.einsum("ij,jk,ik->", gap, gram, gap))


def kept(h: Array, count: int, structured: bool) -> npt.NDArray[np.bool_]:
    if structured:
        columns = np.argsort(-np.linalg.norm(h, axis=0))[:count]
        return np.isin(np.arange(h.shape[1]), columns) & np.ones_like(h, dtype=bool)
    return np.abs(h) >= np.sort(np.abs(h).reshape(-1))[-count]


def turns(
    w: Array, gram: Array, q: Array, h: Array, grid: Array, count: int, structured: bool, iterations: int
) -> tuple[Array, Array]:
    """Try every value of the grid for each place, then one step of gradient descent cut to its largest values."""
    q, best = q.copy(), (q, h)
    for number in range(iterations):
        free = number % 3 == 1 and number < iterations - 1
        for i, j in itertools.product(range(w.shape[0]), range(w.shape[1])):
            rest = w[i] - h[i]
            others = np.where(np.arange(w.shape[1]) == j, 0, q[i])
            if free:
                q[i, j] = (rest - others) @ gram[j] / gram[j, j]
                continue
            tried = rest - others - grid[:, None] * np.eye(w.shape[1])[j]
            q[i, j] = grid[np.argmin(np.einsum("ij,jk,ik->i", tried, gram, tried))]
        if free:
            continue
        gradient = -2 * (w - q - h) @ gram
        h = h - gradient / (2 * np.linalg.eigvalsh(gram)[-1])
        h = np.where(kept(h, count, structured), h, 0)
        if squared(w - q - h, gram) < squared(w - sum(best), gram):
            best = (q.copy(), h)
    return best


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 6])
@pytest.mark.parametrize("shape", [(4, 7), (3, 1), (1, 5)], ids=str)
def test_turns_are_coordinate_descent_and_iterative_hard_thresholding(
    shape: tuple[int, int], iterations: int, structured: bool
) -> None:
    step, count = 0.5, 1 if structured else 3
    count = min(count, shape[0] * shape[1])
    grid = step * np.arange(-3, 4)
    weight, x = 2 * torch.randn(shape, dtype=torch.float64), inputs(shape[1])
    gram = x.T @ x

    def snap(j: int, column: Tensor) -> Tensor:
        return (column / step).round().clamp(-3, 3) * step

    begun = torch.from_numpy(np.where(kept(weight.numpy(), count, structured), weight.numpy(), 0))
    rounded = ((weight - begun) / step).round().clamp(-3, 3) * step
    found = alternate(weight, gram, rounded, begun, snap, count, structured, iterations)
    expected = turns(weight.numpy(), gram.numpy(), rounded.numpy(), begun.numpy(), grid, count, structured, iterations)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, torch.from_numpy(wanted), terms=10**4)


@pytest.mark.parametrize("text", ["int2(rounding='gptq')", "int2(rounding='quantease')"])
def test_result_lies_between_the_start_and_the_best_there_is(text: str) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        weight, x = torch.randn(1, 4, dtype=torch.float64), inputs(4)
        stats, gram = Stats.from_inputs(x), (x.T @ x).numpy()
        codes, beside = terms(Form.parse(f'quantease_outliers("{text}", 0.25)').fit(weight, stats))
        assert codes.zero is not None
        grid = float(codes.scale) * (np.arange(4) - float(codes.zero))
        # One place is free: with the others held, its best value is least squares.
        exact = np.inf
        for place, values in itertools.product(range(4), itertools.product(grid, repeat=4)):
            gap = weight.numpy() - np.array(values)
            gap[0, place] -= gap[0] @ gram[place] / gram[place, place]
            exact = min(exact, squared(gap, gram))
        error = squared((weight - codes.to_dense() - beside.to_dense()).numpy(), gram)
        largest = int(weight.abs().argmax())
        taken = weight * (torch.arange(4) == largest)
        start = Form.parse(text).fit(weight - taken, stats).to_dense()
        assert exact * (1 - 1e-9) <= error <= squared((weight - taken - start).numpy(), gram) * (1 + 1e-9)


@pytest.mark.parametrize("base", ["int3(group=32)", "int4(group=32)", "int8(group=32)", "int3(group='tensor')"])
def test_outliers_take_what_is_furthest_from_the_grid(base: str) -> None:
    weight, x = torch.randn(40, 96), inputs(96, 400)
    weight[torch.rand(40, 96) < 0.01] *= 10
    stats = Stats.from_inputs(x)
    alone = base.replace(")", ", rounding='quantease')")
    texts = [f'quantease_outliers("{base}")', f'quantease_outliers("{base}", iterations=1)', alone]
    errors = []
    for text in texts:
        found = relative_error(weight, Form.parse(text).fit(weight, stats), stats)[1]
        assert found is not None
        errors.append(found)
    assert errors[0] < errors[1]
    assert errors[0] < 0.6 * errors[2]


def test_so_many_values_or_columns_are_held_beside_the_codes() -> None:
    weight, stats = torch.randn(48, 96, dtype=torch.bfloat16), Stats.from_inputs(inputs(96, 300))
    codes, beside = terms(Form.parse("quantease_outliers(0.02, 'int4')").fit(weight, stats))
    assert codes.bits == 4
    assert beside.values.shape == (1, round(0.02 * 48 * 96))
    assert beside.nbytes == (2 + 2) * 92 + 2 * 4  # values, their places, two tiles
    codes, beside = terms(Form.parse("quantease_outliers(0.02, 'int4', structured=true)").fit(weight, stats))
    assert isinstance(beside, ColumnSparse)
    assert beside.values.shape == (48, 2)
    assert beside.nbytes == 2 * 2 * 48 + 2 * 4


@pytest.mark.parametrize("structured", [False, True])
def test_without_data_the_largest_are_taken_out_and_the_rest_is_rounded(structured: bool) -> None:
    weight = torch.randn(20, 50)
    text = f"quantease_outliers(0.1, 'int3(group=16)', structured={str(structured).lower()})"
    codes, beside = terms(Form.parse(text).fit(weight))
    mask = kept(weight.double().numpy(), 5 if structured else 100, structured)
    taken = torch.from_numpy(np.where(mask, weight.numpy(), 0))
    assert torch.equal(beside.to_dense(), taken)
    assert torch.equal(codes.to_dense(), Form.parse("int3(group=16)").fit(weight - taken).to_dense())


def test_largest_eigenvalue_of_large_statistics_bounds_the_step() -> None:
    # Beyond the size at which all eigenvalues are computed: the error still falls, as with a step that is short enough.
    weight, x = torch.randn(3, 600), inputs(600, 700)
    stats = Stats.from_inputs(x)
    errors = [
        relative_error(weight, Form.parse(f"quantease_outliers(iterations={number})").fit(weight, stats), stats)[1]
        for number in (1, 4)
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 50), (33, 50), (9, 2)], ids=str)
def test_awkward_weights_and_data(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[:, 1] = 0
    weight[0, 4:] = 0
    forms = [Form.parse(f"quantease_outliers('int3(group=20)', 0.03, {s})") for s in ("false", "true")]
    for tokens, form in itertools.product((1, shape[1] // 3 + 1, 200), forms):
        x = inputs(shape[1], tokens)
        x[:, 0] = 0  # an input that is never seen
        for stats in (Stats.from_inputs(x), Stats.from_inputs(torch.zeros(3, shape[1]))):
            operator = form.fit(weight, stats)
            assert operator.dtype == dtype
            assert bool(torch.isfinite(operator.to_dense()).all())
            outline = form.outline(shape, dtype)
            assert outline is not None
            assert outline.config() == operator.config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quantease_outliers('nf4')", "base 'nf4' is no integer form; 'int3' would work"),
        ("quantease_outliers('int5')", r"base 'int5' cannot be read: .*did you mean"),
        ("quantease_outliers(0.0)", r"not in \(0, 1\); 0.01 would work"),
        ("quantease_outliers(iterations=0)", "30 would work"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)
