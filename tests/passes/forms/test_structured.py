"""Structured forms against solutions derived anew in numpy, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from recast.passes.forms import Form, Stats, relative_error
from recast.patterns.errors import FormError
from tests.helpers import assert_close

SHAPES = [(24, 36), (36, 24), (36, 36), (12, 72)]


def inputs(n: int, tokens: int, condition: float = 1e2) -> Tensor:
    mix = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(0, -np.log10(condition), n) @ mix.T


def per_slice(weight: np.ndarray, outputs: int, inputs: int, rank: int) -> np.ndarray:
    """Truncate each slice of rows ≡ j (mod outputs) and a block of columns by an SVD of its own."""
    result = np.zeros_like(weight)
    size = weight.shape[1] // inputs
    for j in range(outputs):
        for k in range(inputs):
            place = np.ix_(range(j, weight.shape[0], outputs), range(k * size, (k + 1) * size))
            u, sigma, vt = np.linalg.svd(weight[place], full_matrices=False)
            result[place] = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("blocks", "rank"), [(2, 3), (3, 1), (6, 2), (12, 1)])
def test_monarch_is_the_projection_slice_by_slice(shape: tuple[int, int], blocks: int, rank: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    operator = Form.parse(f"monarch({blocks}, {rank})").fit(weight)
    expected = torch.from_numpy(per_slice(weight.numpy(), blocks, blocks, rank))
    assert_close(operator.to_dense(), expected, terms=10**4)
    assert sum(t.numel() for t in operator.tensors().values()) == blocks * rank * sum(shape)
    again = Form.parse(f"monarch({blocks}, {rank})").fit(operator.to_dense())
    assert_close(again.to_dense(), operator.to_dense(), terms=10**4)


def test_monarch_of_the_paper() -> None:
    # n = 6²: M = P L P R with P the transposition of the grid; the index formula says the same.
    left, right = torch.randn(6, 6, 6, dtype=torch.float64), torch.randn(6, 6, 6, dtype=torch.float64)
    swap = torch.eye(36, dtype=torch.float64)[torch.arange(36).reshape(6, 6).T.flatten()]
    assert torch.equal(swap, swap.T)
    made = swap @ torch.block_diag(*left) @ swap @ torch.block_diag(*right)  # type: ignore[no-untyped-call]
    assert_close(torch.einsum("jlk,kji->ljki", left, right).reshape(36, 36), made, terms=36)
    operator = Form.parse("monarch(6, 1)").fit(made)
    assert_close(operator.to_dense(), made, terms=10**4)
    # The layer's own count of parameters, two over the number of blocks.
    assert Form.parse("monarch").fit(torch.randn(64, 64)).nbytes == 64 * 64 * 4 // 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_monarch_on_data_is_where_neither_factor_gains_much(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), inputs(shape[1], 100)
    stats = Stats.from_inputs(x)
    form = Form.parse("monarch(3, 1)")
    operator = form.fit(weight, stats)
    tensors = operator.tensors()
    loss = float(((weight - operator.to_dense()) @ x.T).square().sum())
    for name, tensor in tensors.items():
        # The matrix is linear in each factor: the best one, the other held, by least squares over all its values at once.
        def dense(values: Tensor, name: str = name) -> Tensor:
            return operator.with_tensors({**tensors, name: values}).to_dense() @ x.T

        slopes = torch.autograd.functional.jacobian(dense, tensor).reshape(-1, tensor.numel())  # type: ignore[no-untyped-call]
        best = np.linalg.lstsq(slopes.numpy(), (weight @ x.T).flatten().numpy(), rcond=None)[0]
        least = float(((weight @ x.T).flatten() - slopes @ torch.from_numpy(best)).square().sum())
        assert least <= loss * (1 + 1e-9)
        assert loss < 1.02 * least
    plain = relative_error(weight, form.fit(weight), stats)[1]
    found = relative_error(weight, operator, stats)[1]
    assert found is not None
    assert plain is not None
    assert found < 0.9 * plain


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("monarch(5)", r"does not split into 5 blocks \(48 % 5 = 3\) at layers.0; 4 or 8 would"),
        ("monarch(4, 13)", "slices of rank at most 12, asked 13 at layers.0; 12 or less would work"),
    ],
)
def test_shapes_are_checked_before_any_work(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text).fit(torch.full((48, 64), torch.nan), where="layers.0")
