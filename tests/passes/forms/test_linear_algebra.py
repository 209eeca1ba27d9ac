"""Systems are solved to rounding, also where torch's own batched LU is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recast.passes.forms.linear_algebra import (
    CUTOFF,
    inverse_factor,
    pseudo_inverse,
    solve_consistent,
    solve_positive,
    turn,
)
from recast.passes.forms.stats import less_error, row_errors
from tests.helpers import assert_close


@pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)
def test_positive_systems_are_solved(batch: tuple[int, ...]) -> None:
    root, right = torch.randn(*batch, 9, 12, dtype=torch.float64), torch.randn(*batch, 9, 2, dtype=torch.float64)
    systems = root @ root.mT + torch.eye(9, dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.solve(systems.numpy(), right.numpy()))
    assert_close(solve_positive(systems, right), expected, terms=9 * 12 * 9)


def test_singular_systems_get_a_ridge_and_others_none() -> None:
    one = torch.ones(2, 4, 4, dtype=torch.float64)
    one[1] = 4 * torch.eye(4, dtype=torch.float64)
    right = torch.ones(2, 4, 1, dtype=torch.float64)
    found = solve_positive(one, right)
    ridge = 1e3 * 4 * torch.finfo(torch.float64).eps  # the first that is tried
    assert_close((one[0] + ridge * torch.eye(4)) @ found[0], right[0], terms=4 * 4)
    assert torch.equal(found[1], right[1] / 4)
    assert not solve_positive(torch.zeros(3, 3), torch.zeros(3, 1)).any()


def test_many_large_systems_with_threads_that_were_set() -> None:
    # In a process of its own: the number of threads is the whole process's.
    script = (
        "import torch; from tests.helpers import assert_close; from recast.passes.forms.linear_algebra import solve_positive\n"
        "torch.manual_seed(0); torch.set_num_threads(2)\n"
        "a = torch.randn(244, 153, 153, dtype=torch.float64)\n"
        "a = a @ a.mT / 153 + torch.eye(153, dtype=torch.float64)\n"
        "b = torch.randn(244, 153, 1, dtype=torch.float64)\n"
        "assert_close(a @ solve_positive(a, b), b, terms=153)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("size", [0, 1, 2, 63, 1500])
def test_rows_and_columns_are_reversed_in_place(size: int) -> None:
    matrix = torch.randn(size, size)
    expected = matrix.flip(0, 1)
    assert torch.equal(turn(matrix), expected)
    assert torch.equal(matrix, expected)
    turned = torch.randn(size, size).T
    assert torch.equal(turn(turned), turned.flip(0, 1))


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 3e-10, 3e-11, 0.0])
def test_directions_below_the_cutoff_are_not_inverted(smallest: float) -> None:
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    values = torch.cat(
        [torch.linspace(0.5, 1, 57, dtype=torch.float64), torch.full((3,), smallest, dtype=torch.float64)]
    )
    matrix = (basis * values) @ basis.T
    kept = torch.where(values > CUTOFF, 1 / values.clamp_min(CUTOFF), 0)
    # What rounding adds to a matrix of size one is, after inversion, larger by the square of the largest that is inverted.
    expected = (basis * kept) @ basis.T
    within = 60 * torch.finfo(torch.float64).eps * float(kept.max()) ** 2
    assert float((pseudo_inverse((matrix + matrix.T) / 2) - expected).abs().max()) < within
    assert within < float(kept.max()) / 100


@pytest.mark.parametrize("rank", [577, 100, 1])
def test_consistent_systems_are_solved_as_by_the_pseudo_inverse(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(rank, 577, dtype=torch.float64) * torch.logspace(0, -2, 577, dtype=torch.float64)
    gram = x.T @ x
    right = torch.randn(60, 577, dtype=torch.float64) @ gram
    expected = right @ torch.linalg.pinv(gram, hermitian=True, rtol=CUTOFF)
    monkeypatch.setattr("recast.passes.forms.linear_algebra.LARGE", 100)
    found = solve_consistent(right, gram)
    # On the data, where it counts: what is at the cutoff, of which the ridge takes a share, is seen by its root.
    assert float(((found - expected) @ x.T).norm()) < CUTOFF**0.5 * float((expected @ x.T).norm())
    assert torch.equal(solve_consistent(torch.zeros_like(right), torch.zeros_like(gram)), torch.zeros_like(right))


@pytest.mark.parametrize("size", [1, 63, 1100])  # the last one is converted in several stretches
def test_factors_are_narrowed_where_they_lie(size: int) -> None:
    x = torch.randn(2 * size, size, dtype=torch.float64)
    gram = x.T @ x
    wide, narrow = inverse_factor(gram, 0.01, 1.0), inverse_factor(gram, 0.01, 1.0, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide.float())
    assert torch.equal(gram, x.T @ x)


@pytest.mark.parametrize("with_gram", [False, True])
def test_rows_of_less_error(with_gram: bool) -> None:
    one, other = torch.randn(300, 63), torch.randn(300, 63)
    other[7], one[8] = one[7], 0
    x = torch.randn(99, 63, dtype=torch.float64)
    gram = x.T @ x if with_gram else None
    expected = row_errors(one, gram) < row_errors(other, gram)
    assert torch.equal(less_error(one, other, gram), expected)
    assert not bool(expected[7])
    assert bool(expected[8])
