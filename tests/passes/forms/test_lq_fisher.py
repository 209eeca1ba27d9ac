"""LQ weighted by a Fisher matrix of rank one, against its definition in numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.forms import Form, Stats, Sum
from recast.patterns.errors import CalibrationError, FormError
from tests.helpers import assert_close

FISHER = "lq(4, 'nf3(group=15)', weighting='fisher')"


def problem(shape: tuple[int, int] = (40, 30)) -> tuple[Tensor, Tensor, Stats]:
    """A weight, a Fisher matrix of rank one that differs much from row to row and column to column, and its statistics."""
    m, n = shape
    weight = torch.randn(m, n, dtype=torch.float64)
    fisher = torch.outer(torch.rand(m, dtype=torch.float64) ** 4, torch.rand(n, dtype=torch.float64) ** 4)
    return weight, fisher, known(fisher)


def known(fisher: Tensor) -> Stats:
    stats = Stats.from_inputs(torch.randn(80, fisher.shape[1], dtype=torch.float64))
    return dataclasses.replace(stats, row_importance=fisher.sum(1), column_importance=fisher.sum(0))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    found: np.ndarray = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return found


def roots(fisher: Tensor) -> np.ndarray:
    """``√(p_i q_j)`` of the means of rows and columns, with the millionth of their mean that is added to each."""
    rows, columns = fisher.mean(1).numpy(), fisher.mean(0).numpy()
    found: np.ndarray = np.sqrt(np.outer(rows + 1e-6 * rows.mean(), columns + 1e-6 * columns.mean()))
    return found


def turns(weight: np.ndarray, scale: np.ndarray, base: str, rank: int) -> tuple[float, np.ndarray]:
    """The algorithm as published, but for the low-rank term that is solved for once more: least error, and what has it."""

    def correction(rest: np.ndarray) -> np.ndarray:
        return truncated(scale * rest, rank) / scale

    best, least = weight, np.inf
    for start in (np.zeros_like(weight), correction(weight)):
        low, last = start, np.inf
        while True:
            rounded = Form.parse(base).fit(torch.from_numpy(weight - low)).to_dense().numpy()
            low = correction(weight - rounded)
            error = float(((scale * (weight - rounded - low)) ** 2).sum())
            if error < least:
                best, least = rounded + low, error
            if not error < last:
                break
            last = error
    return least, best


@pytest.mark.parametrize("shape", [(40, 30), (30, 45), (30, 30)], ids=str)
def test_turns_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    weight, fisher, stats = problem(shape)
    operator = Form.parse(FISHER).fit(weight, stats)
    assert isinstance(operator, Sum)
    least, best = turns(weight.numpy(), roots(fisher), "nf3(group=15)", 4)
    assert_close(operator.to_dense(), torch.from_numpy(best), terms=10**5)
    found = float(((roots(fisher) * (weight - operator.to_dense()).numpy()) ** 2).sum())
    assert abs(found - least) <= 1e-9 * least


@pytest.mark.parametrize("base", ["nf3(group=15)", "int3(group=15)", "minifloat(2, 1)"])
def test_the_weighted_error_is_below_that_of_other_weightings(base: str) -> None:
    weight, fisher, stats = problem()

    def harm(text: str, seen: Stats | None) -> float:
        gap = (weight - Form.parse(text).fit(weight, seen).to_dense()).numpy()
        return float((fisher.numpy() * gap**2).sum())  # entry by entry, with the matrix itself

    weighted = harm(f"lq(4, '{base}', weighting='fisher')", stats)
    assert weighted < 0.8 * harm(f"lq(4, '{base}')", None)
    assert weighted < 0.8 * harm(f"lq(4, '{base}')", stats)


def test_a_base_that_looks_at_its_inputs_sees_the_weights_of_columns() -> None:
    weight, fisher, stats = problem((64, 48))
    scale = roots(fisher)
    plain, searched = (
        Form.parse(f"lq(2, 'minifloat(2, 0, search={search})', weighting='fisher')").fit(weight, stats).to_dense()
        for search in ("false", "true")
    )
    errors = [float(((scale * (weight - dense).numpy()) ** 2).sum()) for dense in (plain, searched)]
    assert errors[1] < 0.9 * errors[0]


def test_a_constant_fisher_matrix_is_no_weighting() -> None:
    weight = torch.randn(33, 40, dtype=torch.float64)
    stats = known(torch.full((33, 40), 3e-9, dtype=torch.float64))
    for base in ("nf3(group=20)", "int3(group=20)"):
        plain = Form.parse(f"lq(5, '{base}')").fit(weight)
        assert_close(
            Form.parse(f"lq(5, '{base}', weighting='fisher')").fit(weight, stats).to_dense(),
            plain.to_dense(),
            terms=10**5,
        )


def test_rows_that_no_gradient_reaches_and_half_weights() -> None:
    weight, fisher, stats = problem((12, 18))
    fisher[3], fisher[:, 4:6] = 0, 0
    form = Form.parse("lq(2, 'nf4(group=6)', weighting='fisher')")
    for each in (known(fisher), known(0 * fisher), dataclasses.replace(stats, gram=None)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            operator = form.fit(weight.to(dtype), each)
            assert operator.dtype == dtype
            assert bool(torch.isfinite(operator.to_dense()).all())
    nothing = form.fit(torch.zeros(12, 18), stats)
    assert not nothing.to_dense().any()


@pytest.mark.parametrize("text", [FISHER, "lorc(2, 'fwsvd(1)')", "fwsvd(2) + int4", "fwsvd(2) | int8"])
def test_without_a_loss_it_is_refused_and_with_one_it_is_fitted(text: str) -> None:
    weight, _, stats = problem()
    form = Form.parse(text)
    assert Form.parse(str(form)) == form
    assert form.needs_loss
    with pytest.raises(CalibrationError, match=r"there are no statistics; recast.calibrate\(.*loss=...\) gathers"):
        form.fit(weight)
    with pytest.raises(CalibrationError, match="these statistics hold none"):
        form.fit(weight, Stats.from_inputs(torch.randn(9, 30)))
    with pytest.raises(CalibrationError, match="importances of 5 rows, but the weight has 40"):
        form.fit(weight, dataclasses.replace(stats, row_importance=torch.rand(5)))
    assert form.fit(weight, stats).shape == weight.shape
    # Behind rewritten sites, where the fit aims at another matrix.
    assert stats.gram is not None
    behind = dataclasses.replace(stats, cross=1.5 * stats.gram)
    near, far = (form.fit(weight, seen).to_dense() for seen in (stats, behind))
    assert float((far - 1.5 * weight).norm()) < float((near - 1.5 * weight).norm())


def test_a_loss_gathers_what_it_needs() -> None:
    program = recast.capture(nn.Sequential(nn.Linear(24, 20)).eval(), (torch.randn(3, 24),))
    batches = [torch.randn(8, 24) for _ in range(3)]
    text = "lq(2, 'nf4', weighting='fisher')"
    calibration = recast.calibrate(program, batches, loss=lambda output, _: output[..., :3].square().sum())
    operator = recast.plan(program, {"default": text, "allow_larger": True}, calibration).entries["0"]
    assert str(operator.form) == "lq(base='nf4', rank=2, weighting='fisher')"
    with pytest.raises(CalibrationError, match=r"importances .* are needed"):
        recast.plan(program, {"default": text, "allow_larger": True}, recast.calibrate(program, batches))


def test_other_weightings_are_told() -> None:
    with pytest.raises(FormError, match="lq: weighting is 'fischer'; did you mean 'fisher'"):
        Form.parse("lq(weighting='fischer')")
