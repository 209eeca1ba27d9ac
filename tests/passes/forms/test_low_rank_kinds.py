"""Low rank by other weights, by a threshold, and by sketching, against numpy and scipy in float64."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recast.passes.forms import Dense, Form, Product, Stats, relative_error
from recast.passes.forms import linear_algebra as algebra
from recast.passes.forms.gradient import refine
from recast.passes.forms.linear_algebra import leading_subspace
from recast.patterns.errors import CalibrationError, FormError
from tests.helpers import assert_close


def inputs(n: int, tokens: int, condition: float = 1e2) -> Tensor:
    """Inputs that vary together, a few of them much larger than the others."""
    mix: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    x = torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(0, -np.log10(condition), n) @ mix.T
    x[:, :: max(1, n // 4)] *= 20
    return x


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    result: np.ndarray = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return result


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_asvd_is_the_svd_of_the_scaled_weight(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), inputs(shape[1], 300)
    for sample, alpha in ((300, 0.5), (300, 1.0), (0, 0.5)):
        stats = Stats.from_inputs(x, sample=sample)
        form = Form.parse(f"asvd(6, alpha={alpha})")
        size = x.abs().mean(0) if sample else (x.square().mean(0) * 2 / np.pi).sqrt()
        scale = ((size + 1e-6 * size.mean()) ** alpha).numpy()
        expected = truncated(weight.numpy() * scale, 6) / scale
        assert_close(form.solve(weight, stats).to_dense(), torch.from_numpy(expected), terms=10**5)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)], ids=str)
@pytest.mark.parametrize("rank", [3, 10])
def test_the_better_the_data_is_known_the_lower_the_error_on_it(shape: tuple[int, int], rank: int) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), inputs(shape[1], 400)
    y_gradient = torch.randn(400, shape[0], dtype=torch.float64)
    stats = dataclasses.replace(
        Stats.from_inputs(x, sample=400),
        row_importance=torch.einsum("ti,tj->i", y_gradient**2, x**2),
        column_importance=torch.einsum("ti,tj->j", y_gradient**2, x**2),
    )
    error = {}
    for name in ("low_rank", "asvd", "fwsvd"):
        # As published, without the comparison that `fit` ends with.
        operator = Form.parse(f"{name}({rank}, axis='columns')" if name == "fwsvd" else f"{name}({rank})").solve(
            weight, stats
        )
        error[name] = relative_error(weight, operator, stats)[1] or 0.0
    plain = relative_error(weight, Form.parse(f"low_rank({rank})").fit(weight), stats)[1] or 0.0
    assert error["low_rank"] < min(error["asvd"], error["fwsvd"])
    assert max(error["asvd"], error["fwsvd"]) < plain


def importances(rows: Tensor, columns: Tensor) -> Stats:
    stats = Stats.from_inputs(torch.randn(50, len(columns), dtype=torch.float64))
    return dataclasses.replace(stats, row_importance=rows, column_importance=columns)


@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_fisher_weights_are_minimised(axis: str) -> None:
    weight = torch.randn(12, 18, dtype=torch.float64)
    rows, columns = torch.rand(12, dtype=torch.float64) ** 4, torch.rand(18, dtype=torch.float64) ** 4
    operator = Form.parse(f"fwsvd(4, axis='{axis}')").fit(weight, importances(rows, columns))
    # A millionth of the mean is added to each importance, so that rows no gradient reaches can be scaled back.
    p = (rows + 1e-6 * rows.mean() if axis != "columns" else torch.ones_like(rows)).sqrt().numpy()[:, None]
    q = (columns + 1e-6 * columns.mean() if axis != "rows" else torch.ones_like(columns)).sqrt().numpy()
    tail = scipy.linalg.svdvals(p * weight.numpy() * q)[4:]
    found = np.linalg.norm(p * (weight - operator.to_dense()).numpy() * q)
    assert_close(torch.tensor(found), torch.tensor(np.sqrt((tail**2).sum())), terms=12 * 18)


def test_fisher_weights_keep_what_a_loss_is_sensitive_to() -> None:
    # A loss of known curvature, Σ c_i y_i²: gradients of y are 2 c y.
    weight, x = torch.randn(20, 20, dtype=torch.float64), torch.randn(500, 20, dtype=torch.float64)
    curvature = torch.logspace(2, -2, 20, dtype=torch.float64)
    gradient = 2 * curvature * (x @ weight.T + torch.randn(500, 20, dtype=torch.float64))
    fisher = torch.einsum("ti,tj->ij", gradient**2, x**2)
    stats = dataclasses.replace(Stats.from_inputs(x), row_importance=fisher.sum(1), column_importance=fisher.sum(0))

    def harm(text: str) -> float:
        gap = x @ (weight - Form.parse(text).fit(weight, stats).to_dense()).T
        return float((curvature * gap**2).sum())

    assert harm("fwsvd(5)") < 0.5 * harm("low_rank(5)")
    assert harm("fwsvd(5, axis='both')") < 0.5 * harm("low_rank(5)")


def test_fisher_weights_without_a_loss_are_refused() -> None:
    weight, form = torch.randn(8, 6), Form.parse("fwsvd(2)")
    with pytest.raises(CalibrationError, match=r"there are no statistics; recast.calibrate\(.*loss=...\) gathers"):
        form.fit(weight)
    with pytest.raises(CalibrationError, match="these statistics hold none"):
        form.fit(weight, Stats.from_inputs(torch.randn(9, 6)))
    with pytest.raises(CalibrationError, match="importances of 5 rows, but the weight has 8"):
        form.fit(weight, importances(torch.rand(5), torch.rand(6)))
    with pytest.raises(CalibrationError, match="column_importance has shape"):
        form.fit(
            weight, dataclasses.replace(importances(torch.rand(8), torch.rand(6)), column_importance=torch.rand(3))
        )
    with pytest.raises(CalibrationError, match="row_importance is not finite"):
        form.fit(weight, importances(torch.full((8,), torch.nan), torch.rand(6)))


def test_fisher_weights_of_nothing_and_half_weights() -> None:
    weight = torch.randn(8, 6)
    stats = importances(torch.zeros(8), torch.zeros(6))
    assert_close(
        Form.parse("fwsvd(2)").fit(weight, stats).to_dense(),
        Form.parse("low_rank(2)").fit(weight).to_dense(),
        terms=100,
    )
    some = importances(torch.tensor([1.0] + 7 * [0.0]), torch.rand(6))
    for dtype in (torch.bfloat16, torch.float16):
        operator = Form.parse("fwsvd(2)").fit(weight.to(dtype), some)
        assert operator.dtype == dtype
        assert_close(operator.to_dense()[0], weight.to(dtype)[0], terms=10)


def test_importances_follow_the_features() -> None:
    stats = importances(torch.rand(4), torch.rand(6))
    assert stats.hash != dataclasses.replace(stats, row_importance=None).hash
    part = stats.part(slice(2, 5))
    assert part.column_importance is not None
    assert part.column_importance.shape == (3,)
    after = stats.through(Dense(torch.randn(5, 6, dtype=torch.float64)))
    assert after.column_importance is None
    assert after.row_importance is stats.row_importance


def test_welore_counts_singular_values() -> None:
    weight = torch.randn(30, 40, dtype=torch.float64)
    sigma = scipy.linalg.svdvals(weight.numpy())
    for threshold in (0.9, 0.7, 0.6):
        operator = Form.parse(f"welore({threshold})").fit(weight)
        rank = int((sigma / sigma[0] >= threshold).sum())
        if rank * 70 < 1200:
            assert_close(operator.to_dense(), torch.from_numpy(truncated(weight.numpy(), rank)), terms=10**4)
        else:
            assert isinstance(operator, Dense)
    assert isinstance(Form.parse("welore(0.9)").fit(weight), Product)
    assert isinstance(Form.parse("welore(0.9, least_cut=0.95)").fit(weight), Dense)
    # The rank is the weight's own, the factors the data's.
    stats = Stats.from_inputs(inputs(40, 200))
    rank = int((sigma / sigma[0] >= 0.7).sum())
    expected = Form.parse(f"low_rank({rank})").fit(weight, stats)
    assert torch.equal(Form.parse("welore(0.7)").fit(weight, stats).to_dense(), expected.to_dense())


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_sketching_is_within_a_percent(shape: tuple[int, int], decay: float) -> None:
    m, n = shape
    sizes = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    weight = torch.linalg.qr(torch.randn(m, min(shape), dtype=torch.float64)).Q * sizes
    weight = weight @ torch.linalg.qr(torch.randn(n, min(shape), dtype=torch.float64)).Q.T
    for x in (None, inputs(n, 1000, 1e3)):
        gram = None if x is None else x.T @ x
        sigma = scipy.linalg.svdvals(weight.numpy() if x is None else (weight @ x.T).numpy())
        before = weight.clone(), None if gram is None else gram.clone()
        basis = leading_subspace(weight, gram, rank=40, solver="randomized")
        assert torch.equal(weight, before[0])
        assert gram is None or torch.equal(gram, before[1])
        assert_close(basis.T @ basis, torch.eye(40, dtype=torch.float64), terms=10**4)
        rest = weight - basis @ (basis.T @ weight)
        found = float((rest if x is None else rest @ x.T).norm())
        assert found <= 1.01 * float(np.sqrt((sigma[40:] ** 2).sum()))
        assert torch.equal(basis, leading_subspace(weight, gram, rank=40, solver="randomized"))


def test_large_weights_are_sketched_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(60, 80, dtype=torch.float64)
    exact, sketched = (Form.parse(f"low_rank(10, solver='{s}')").fit(weight) for s in ("exact", "randomized"))
    assert torch.equal(Form.parse("low_rank(10)").fit(weight).to_dense(), exact.to_dense())
    monkeypatch.setattr(algebra, "LARGE", 50)
    assert torch.equal(Form.parse("low_rank(10)").fit(weight).to_dense(), sketched.to_dense())
    assert torch.equal(Form.parse("low_rank(10, solver='exact')").fit(weight).to_dense(), exact.to_dense())
    assert not torch.equal(exact.to_dense(), sketched.to_dense())


@pytest.mark.parametrize("tokens", [1, 5])
def test_sketching_with_fewer_directions_than_asked_for(tokens: int) -> None:
    weight, x = torch.randn(40, 30, dtype=torch.float64), torch.randn(tokens, 30, dtype=torch.float64)
    operator = Form.parse("low_rank(8, solver='randomized')").fit(weight, Stats.from_inputs(x))
    assert operator.tensors()["left.weight"].shape == (40, 8)
    assert (relative_error(weight, operator, Stats.from_inputs(x))[1] or 0.0) < 1e-6
    zero = Form.parse("low_rank(8, solver='randomized')").fit(torch.zeros(40, 30))
    assert not zero.to_dense().any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("low_rank(4, solver='exakt')", "solver is 'exakt'; did you mean 'exact'?"),
        ("asvd", "asvd: no parameter is given"),
        ("asvd(4, alpha=9)", "alpha is 9.0, not in"),
        ("fwsvd(4, axis='row')", "axis is 'row'; did you mean 'rows'?"),
        ("welore(0)", "threshold is 0.0, not in"),
        ("welore(0.1, 1)", "least_cut is 1.0, not in"),
    ],
)
def test_parameters_are_checked(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)


def test_gradients_go_on_where_turns_end() -> None:
    left, right = torch.randn(4, 6, 6, dtype=torch.float64), torch.randn(2, 12, 12, dtype=torch.float64)
    exact = torch.block_diag(*left) @ torch.block_diag(*right)  # type: ignore[no-untyped-call]
    mixing = Form.parse("block_diagonal(2)").fit(torch.eye(24, dtype=torch.float64))
    rough = Product(Form.parse("block_diagonal(4)").fit(exact), mixing)
    stats = Stats.from_inputs(inputs(24, 200, 10.0))
    for given in (None, stats):
        before, after = (relative_error(exact, op, given) for op in (rough, refine(rough, exact, given)))
        assert (after[0] if given is None else after[1] or 0.0) < 0.8 * (before[0] if given is None else before[1] or 0)
    done = refine(rough, exact, None, steps=500)
    assert relative_error(exact, refine(done, exact, None, rate=10.0))[0] <= relative_error(exact, done)[0]
    # Whole numbers stay: the order of a permutation, the codes of a quantized factor.
    fixed = Form.parse("permutation").fit(exact)
    assert refine(fixed, exact, None) is fixed
    huge = torch.empty(1 << 20, 1 << 20, device="meta")
    assert refine(fixed, huge, None) is fixed
