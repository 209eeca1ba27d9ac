"""Structured forms against solutions derived anew in numpy, in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from recast.passes.forms import Dense, Form, Product, Stats, relative_error
from recast.passes.forms.permutation import Permutation, Shuffle
from recast.patterns.errors import FormError
from tests.helpers import assert_close

SHAPES = [(24, 36), (36, 24), (36, 36), (12, 72)]


def inputs(n: int, tokens: int, condition: float = 1e2) -> Tensor:
    mix: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
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


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)], ids=str)
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_dense_is_an_svd_of_each_block_of_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    operator = Form.parse("block_dense(3, 9)").fit(weight)
    assert_close(operator.to_dense(), torch.from_numpy(per_slice(weight.numpy(), 1, 3, 3)), terms=10**4)
    assert sum(t.numel() for t in operator.tensors().values()) == 9 * shape[1] // 3 + 9 * shape[0]
    # On data the dense factor is the least-squares solution behind the other.
    x = inputs(shape[1], 200)
    operator = Form.parse("block_dense(3, 9)").fit(weight, Stats.from_inputs(x))
    assert isinstance(operator, Product)
    read = operator.right.apply(x).numpy()
    least = np.linalg.lstsq(read, (x @ weight.T).numpy(), rcond=None)[1].sum()
    loss = float(((weight - operator.to_dense()) @ x.T).square().sum())
    assert least <= loss * (1 + 1e-9)
    assert loss < 1.02 * least


def test_block_shuffle_has_the_matrices_of_monarch() -> None:
    weight = torch.randn(24, 36, dtype=torch.float64)
    stats = Stats.from_inputs(inputs(36, 100))
    one, other = (Form.parse(text).fit(weight, stats) for text in ("block_shuffle", "monarch(2)"))
    assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("shape", [(5, 5), (5, 8), (8, 5)], ids=str)
def test_diagonal_is_least_squares(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), inputs(shape[1], 50)
    x[:, 2] = 0
    values = Form.parse("diagonal").fit(weight, Stats.from_inputs(x)).tensors()["values"]
    y = x @ weight.T
    for i in range(5):
        expected = weight[2, 2] if i == 2 else (x[:, i] @ y[:, i]) / (x[:, i] @ x[:, i])
        assert_close(values[i], expected, terms=10**3)


def test_permutation_is_the_best_of_all() -> None:
    weight, x = torch.randn(5, 5, dtype=torch.float64), inputs(5, 50)
    gram = x.T @ x
    for stats, metric in ((None, torch.eye(5, dtype=torch.float64)), (Stats.from_inputs(x), gram)):
        errors = {}
        for order in itertools.permutations(range(5)):
            gap = weight - torch.eye(5, dtype=torch.float64)[list(order)]
            errors[order] = float((gap @ metric * gap).sum())
        found = Form.parse("permutation").fit(weight, stats).tensors()["places"]
        assert tuple(found.tolist()) == min(errors, key=lambda order: errors[order])


def test_moved_features_are_the_product_with_the_dense_matrix() -> None:
    order = Permutation(torch.randperm(12).to(torch.int32), torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    for operator in (order, Shuffle(3, 4, torch.float64), Shuffle(2, 3, torch.float64, 2)):
        dense = operator.to_dense()
        assert torch.equal(operator.apply(x), x @ dense.T)
        assert torch.equal(operator.inverse().to_dense(), dense.T)
        weight = Dense(torch.randn(12, 12, dtype=torch.float64))
        assert torch.equal(Product(operator, weight).to_dense(), dense @ weight.weight)
        assert torch.equal(Product(weight, operator).to_dense(), weight.weight @ dense)


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (40, 40)], ids=str)
def test_hidden_blocks_are_found(shape: tuple[int, int]) -> None:
    blocks = torch.randn(4, shape[0] // 4, shape[1] // 4, dtype=torch.float64)
    hidden = torch.block_diag(*blocks)[torch.randperm(shape[0])][:, torch.randperm(shape[1])]  # type: ignore[no-untyped-call]
    stats = Stats.from_inputs(inputs(shape[1], 200))
    for given in (None, stats):
        assert relative_error(hidden, Form.parse("permuted_block_diagonal(4)").fit(hidden, given))[0] < 1e-6
    # With something between the blocks, too: what is lost is what lies outside of them.
    noisy = hidden + 0.1 * torch.randn(shape, dtype=torch.float64)
    found = relative_error(noisy, Form.parse("permuted_block_diagonal(4)").fit(noisy))[0]
    outside = float(torch.where(hidden == 0, noisy, 0).norm() / noisy.norm())
    assert found <= outside * (1 + 1e-9)
    assert found < 0.5 * relative_error(noisy, Form.parse("block_diagonal(4)").fit(noisy))[0]


def test_many_features_are_dealt_out_greedily() -> None:
    blocks = torch.randn(4, 512, 3)
    rows = torch.randperm(2048)
    hidden = torch.block_diag(*blocks)[rows]  # type: ignore[no-untyped-call]
    assert relative_error(hidden, Form.parse("permuted_block_diagonal(4)").fit(hidden))[0] < 1e-5


@pytest.mark.parametrize(("shape", "data"), [((24, 36), False), ((36, 24), True)], ids=str)
def test_blast_finds_more_than_low_rank(shape: tuple[int, int], data: bool) -> None:
    m, n = shape
    left, right = torch.randn(4, m // 4, 3, dtype=torch.float64), torch.randn(4, n // 4, 3, dtype=torch.float64)
    weights = torch.rand(4, 4, 3, dtype=torch.float64)
    planted = torch.einsum("ipr,ijr,jqr->ipjq", left, weights, right).reshape(m, n)
    stats = Stats.from_inputs(inputs(n, 200, 10.0)) if data else None
    errors = []
    for text in ("low_rank(3)", "blast(4, 3, iterations=20)", "blast(4, 3)"):
        plain, output = relative_error(planted, Form.parse(text).fit(planted, stats), stats)
        errors.append(plain if output is None else output)
    assert errors[2] <= errors[1] < errors[0]
    assert errors[2] < 0.2 * errors[0]


def test_blast_is_at_least_the_low_rank_fit() -> None:
    weight = torch.randn(24, 24, dtype=torch.float64)
    operator = Form.parse("blast(4, 6, iterations=30)").fit(weight)
    assert sum(t.numel() for t in operator.tensors().values()) == 6 * (24 + 24 + 16)
    assert relative_error(weight, operator)[0] < 0.97 * relative_error(weight, Form.parse("low_rank(6)").fit(weight))[0]
    grid = operator.to_dense().reshape(4, 6, 4, 6).transpose(1, 2)
    tensors = operator.tensors()
    for i, j in itertools.product(range(4), range(4)):
        block = tensors["left.blocks"][i] * tensors["right.left.weights"][i, j] @ tensors["right.right.blocks"][j]
        assert_close(grid[i, j], block, terms=6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("monarch(5)", r"does not split into 5 blocks \(48 % 5 = 3\) at layers.0; 4 or 8 would"),
        ("monarch(4, 13)", "slices of rank at most 12, asked 13 at layers.0; 12 or less would work"),
        ("block_dense(3)", r"does not split into 3 blocks \(64 % 3 = 1\) at layers.0; 2 or 4 would"),
        ("block_dense(2, 66)", "has an inner size of 64 at most, asked 66 at layers.0; rank 64 or less would work"),
        ("block_dense(ratio=0.01)", "keeps no rank at ratio 0.01 at layers.0; ratio 0.05214 or more would work"),
        ("permuted_block_diagonal(5)", "4 or 8 would"),
        ("permutation", r"is not square at layers.0; \(48, 48\) would"),
        ("blast(5)", "4 or 8 would"),
        ("blast(4, 49)", "has rank at most 48, asked 49 at layers.0; rank 48 or less would work"),
        (
            "blast(16, ratio=0.01)",
            "keeps no rank in 16 x 16 blocks at layers.0; ratio 0.1199 or more or fewer blocks would",
        ),
        ("blast(1, ratio=0.01)", "keeps no rank in 1 x 1 blocks at layers.0; ratio 0.03682 or more would work"),
    ],
)
def test_shapes_are_checked_before_any_work(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text).fit(torch.full((48, 64), torch.nan), where="layers.0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("monarch(0)", "monarch: blocks is 0, not positive; 4 would work"),
        ("block_shuffle(2, 0)", "block_shuffle: rank is 0, not positive"),
        ("block_dense(2, 5)", "rank is 5, not a multiple of the 2 blocks; 6 would work"),
        ("block_dense(2, 4, 0.5)", "given together"),
        ("blast(rank=4, ratio=0.5)", "given together"),
        ("blast(iterations=0)", "iterations is 0, not positive"),
        ("permuted_block_diagonal(0)", "blocks is 0, not positive"),
        ("diagonal | int8", "leaves no dense factor"),
    ],
)
def test_parameters_are_checked(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)
