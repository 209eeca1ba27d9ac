"""Systems are solved to rounding, also where torch's own batched LU is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recast.passes.forms.linear_algebra import solve_positive, turn
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
