"""Sparse forms against masks, sizes and solutions derived anew in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from recast.kernels.sparse_matmul import reference
from recast.passes.forms import Dense, Form, Operator, Quantized, Stats, Sum, relative_error
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.nm_sparse import NMSparse
from recast.passes.forms.sparse import Sparse
from recast.patterns.errors import FormError
from tests.helpers import assert_close

Array = npt.NDArray[np.float64]


def correlated(n: int, tokens: int) -> Tensor:
    """Inputs that predict each other, some of them much larger than others."""
    mix = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    size = torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n)]
    return torch.randn(tokens, n, dtype=torch.float64) @ mix.T * size


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31])
def test_codes_are_packed_lowest_bit_first(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count))
    single = (codes.numpy()[..., None] >> np.arange(bits) & 1).reshape(3, -1)
    packed = reference.pack_bits(codes, bits)
    assert np.array_equal(packed.numpy(), np.packbits(single.astype(np.uint8), axis=1, bitorder="little"))
    assert torch.equal(reference.unpack_bits(packed, bits, count).long(), codes)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("sparse24", 9.0),  # half of 16 bits, and 2 bits for each
        ("sparse_nm(4, 8)", 8 + 1.5),
        ("sparse_nm(1, 2)", 8 + 0.5),
        ("unstructured(0.5)", 8 + 1),
        ("unstructured(0.2)", 3.25 + 1),  # 13 of 64 inputs of a row are nearest to a fifth
        ("sparse24 | int4(group=64)", 2 + 1 + 32 / 128),  # a float32 scale for 64 values, of 128 inputs
        ("column_sparse(0.5)", 8 + 32 * 32 / (128 * 64)),
    ],
)
def test_bytes_are_those_that_the_papers_count(text: str, bits: float) -> None:
    features = 128 if "int4" in text else 64
    weight = torch.randn(128, features, dtype=torch.bfloat16)
    assert Form.parse(text).fit(weight).nbytes * 8 / weight.numel() == bits


def kept_by(score: Array, keep: int, of: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(score.shape, bool)
    for row, start in itertools.product(range(score.shape[0]), range(0, score.shape[1], of)):
        group = score[row, start : start + of]
        mask[row, start + np.argsort(-group)[:keep]] = True
    return mask


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 3), (5, 8)])
@pytest.mark.parametrize("shape", [(6, 16), (5, 13), (3, 3), (1, 9)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "nowag"])
def test_the_largest_scores_of_each_group_stay_as_they_are(
    method: str, shape: tuple[int, int], keep: int, of: int
) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), correlated(shape[1], 40)
    w, size = weight.numpy(), np.sqrt((x.numpy() ** 2).sum(0))
    by_column = w / np.linalg.norm(w, axis=0)
    score = {
        "magnitude": np.abs(w),
        "wanda": np.abs(w) * size,
        "nowag": (by_column / np.linalg.norm(by_column, axis=1, keepdims=True)) ** 2 * size**2,
    }[method]
    operator = Form.parse(f"sparse_nm({keep}, {of}, '{method}')").solve(weight, Stats.from_inputs(x))
    assert np.array_equal(operator.to_dense().numpy(), np.where(kept_by(score, keep, of), w, 0))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "nowag"])
def test_unstructured_scores_are_compared_over_the_matrix_or_a_row(method: str) -> None:
    weight, x = torch.randn(7, 20, dtype=torch.float64), correlated(20, 60)
    w, size = weight.numpy(), np.sqrt((x.numpy() ** 2).sum(0))
    by_column = w / np.linalg.norm(w, axis=0)
    normalised = by_column / np.linalg.norm(by_column, axis=1, keepdims=True)
    score = {"magnitude": np.abs(w), "wanda": np.abs(w) * size, "nowag": np.abs(normalised) * size}[method]
    if method == "wanda":
        mask = kept_by(score, 6, 20)
    else:
        mask = score >= np.sort(score.reshape(-1))[-7 * 6]
    operator = Form.parse(f"unstructured(0.3, '{method}')").solve(weight, Stats.from_inputs(x))
    assert np.array_equal(operator.to_dense().numpy(), np.where(mask, w, 0))


def brain_surgeon(weight: Array, gram: Array, keep: int, of: int, damping: float = 0.01) -> Array:
    """Prune columns from the left, each by the optimal brain surgeon on the columns that are left, inverting anew."""
    w: Array = weight.copy()
    n = weight.shape[1]
    hessian = gram + damping * np.trace(gram) / n * np.eye(n)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(n)]
    for start in range(0, n, of):
        columns = np.arange(start, min(start + of, n))
        harm = w[:, columns] ** 2 / np.array([inverses[j][0, 0] for j in columns])
        kept = kept_by(harm, keep, of)
        for place, j in enumerate(columns):
            pruned = np.where(kept[:, place], 0, w[:, j])
            w[:, j:] -= pruned[:, None] * inverses[j][0] / inverses[j][0, 0]
            w[~kept[:, place], j] = 0
    return w


@pytest.mark.parametrize(
    ("shape", "keep", "of"), [((5, 13), 2, 4), ((4, 16), 2, 4), ((1, 9), 1, 3), ((3, 150), 2, 4), ((2, 140), 4, 8)]
)
def test_sparsegpt_is_the_exact_brain_surgeon_from_left_to_right(shape: tuple[int, int], keep: int, of: int) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), correlated(shape[1], 3 * shape[1])
    stats = Stats.from_inputs(x)
    operator = Form.parse(f"sparse_nm({keep}, {of}, 'sparsegpt')").solve(weight, stats)
    assert isinstance(operator, NMSparse)
    expected = brain_surgeon(weight.numpy(), (x.T @ x).numpy(), keep, of)
    assert np.array_equal(operator.mask().numpy(), expected != 0)
    assert_close(operator.to_dense(), torch.from_numpy(expected), terms=10**9)
    # No values at these places are better than the least-squares ones.
    mask = operator.mask().numpy()
    best = sum(
        float(np.linalg.lstsq(x.numpy()[:, m], x.numpy() @ row, rcond=None)[1].sum())
        for row, m in zip(weight.numpy(), mask, strict=True)
    )
    gap = float((((weight - operator.to_dense()) @ x.T) ** 2).sum())
    assert best <= gap * (1 + 1e-9)


def test_sparsegpt_unstructured_keeps_as_many_as_asked_in_each_stretch() -> None:
    weight, x = torch.randn(9, 300), correlated(300, 900)
    operator = Form.parse("unstructured(0.37, 'sparsegpt')").solve(weight, Stats.from_inputs(x))
    counts = [int((part != 0).sum()) for part in torch.split(operator.to_dense(), 128, 1)]
    assert sum(counts) == 9 * 111
    assert all(abs(count - 0.37 * 9 * width) <= 1 for count, width in zip(counts, (128, 128, 44), strict=True))


@pytest.mark.parametrize("text", ["sparse24({})", "sparse_nm(4, 8, {})", "unstructured(0.5, {})"])
def test_methods_that_know_more_of_correlated_inputs_lose_less(text: str) -> None:
    weight = torch.randn(48, 64) + torch.randn(48, 4) @ torch.randn(4, 64)
    stats = Stats.from_inputs(correlated(64, 400))

    def error(method: str) -> float:
        found = relative_error(weight, Form.parse(text.format(f"'{method}'")).solve(weight, stats), stats)[1]
        assert found is not None
        return found

    assert error("sparsegpt") < 0.95 * error("wanda")
    assert error("wanda") < 0.8 * error("magnitude")
    assert error("nowag") < error("magnitude")
    # Without being told, the best of them; without data, the size of the values.
    default = Form.parse(text.format("damping=0.01"))
    assert torch.equal(
        default.fit(weight, stats).to_dense(), Form.parse(text.format("'sparsegpt'")).fit(weight, stats).to_dense()
    )
    plain = Form.parse(text.format("'magnitude'")).fit(weight).to_dense()
    assert torch.equal(default.fit(weight).to_dense(), plain)
    assert torch.equal(Form.parse(text.format("'sparsegpt'")).fit(weight).to_dense(), plain)


def test_kept_columns_take_over_what_they_predict() -> None:
    weight, x = torch.randn(5, 12, dtype=torch.float64), correlated(12, 80)
    operator = Form.parse("column_sparse(0.5)").solve(weight, Stats.from_inputs(x))
    assert isinstance(operator, ColumnSparse)
    size = np.linalg.norm(weight.numpy(), axis=0) * np.linalg.norm(x.numpy(), axis=0)
    columns = np.sort(np.argsort(-size)[:6])
    assert operator.columns.tolist() == columns.tolist()
    expected = np.linalg.lstsq(x.numpy()[:, columns], (x @ weight.T).numpy(), rcond=None)[0].T
    assert_close(operator.values.to_dense(), torch.from_numpy(expected), terms=10**9)


def test_a_few_exact_columns_beside_a_rounded_rest() -> None:
    weight, x = torch.randn(32, 64), torch.randn(300, 64)
    weight[:, 7] *= 30
    stats = Stats.from_inputs(x)
    both = Form.parse("column_sparse(0.02) + int4(group=16)").fit(weight, stats)
    assert isinstance(both, Sum)
    column = both.terms[0]
    assert isinstance(column, ColumnSparse)
    assert column.columns.tolist() == [7]
    errors = [
        relative_error(weight, found, stats)[1] for found in (both, Form.parse("int4(group=16)").fit(weight, stats))
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("data", [False, True])
def test_sparse_plus_low_rank_finds_what_was_added(data: bool) -> None:
    low = torch.randn(40, 3) @ torch.randn(3, 50)
    sparse = torch.zeros(40, 50)
    places = torch.randperm(2000)[:40]
    sparse.view(-1)[places] = 20 * torch.sign(torch.randn(40))
    stats = Stats.from_inputs(torch.randn(300, 50)) if data else None
    weight = low + sparse
    operator = Form.parse("sparse_low_rank(3, 0.02)").fit(weight, stats)
    assert relative_error(weight, operator)[0] < 1e-2
    assert operator.config() == (Form.parse("unstructured(0.02) + low_rank(3)").fit(weight, stats)).config()
    for text in ("unstructured(0.08)", "low_rank(5)"):
        assert relative_error(weight, operator)[0] < 0.2 * relative_error(weight, Form.parse(text).fit(weight))[0]


def test_values_are_quantized_by_how_much_they_weigh() -> None:
    weight, x = torch.randn(24, 48), correlated(48, 200)
    stats = Stats.from_inputs(x)
    pruned = Form.parse("sparse24").fit(weight, stats)
    rounded = Form.parse("sparse24 | int4(group=8)").fit(weight, stats)
    assert isinstance(pruned, NMSparse)
    assert isinstance(rounded, NMSparse)
    assert isinstance(rounded.values, Quantized)
    assert torch.equal(rounded.indices, pruned.indices)
    assert_close(rounded.values.to_dense() @ torch.ones(24), rounded.to_dense().sum(1), terms=48)
    blind = NMSparse(Form.parse("int4(group=8)").fit(pruned.values.to_dense()), pruned.indices, 2, 4, 48)
    errors = [relative_error(pruned.to_dense(), found, stats)[1] for found in (rounded, blind)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] <= errors[1] * (1 + 1e-6)


TEXTS = ["sparse24", "sparse24('nowag')", "sparse_nm(3, 8)", "unstructured(0.4)", "column_sparse(0.4)"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 9), (9, 2), (6, 30)], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_dead_rows_columns_and_inputs(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    weight, x = torch.randn(shape, dtype=dtype), torch.randn(5, n)
    x[:, ::3] = 0
    if n > 2:
        weight[:, 1] = 0
    if m > 1:
        weight[-1] = 0
    for stats in (None, Stats.from_inputs(x), Stats.from_inputs(torch.zeros(2, n))):
        operator = Form.parse(text).fit(weight, stats)
        dense = operator.to_dense()
        assert isinstance(operator, Sparse)
        assert dense.dtype == dtype
        assert bool(torch.isfinite(dense).all())
        if m > 1:
            assert not dense[-1].any()


def test_inputs_that_are_never_seen_go_first_the_small_ones_among_them() -> None:
    weight = torch.tensor([[9.0, 8.0, 0.1, 7.0], [9.0, 8.0, 0.1, 0.2]])
    x = torch.randn(30, 4)
    x[:, :2] = 0
    for method in ("wanda", "sparsegpt"):
        found = Form.parse(f"sparse24('{method}')").solve(weight, Stats.from_inputs(x)).to_dense()
        assert torch.equal(found != 0, torch.tensor([[False, False, True, True]] * 2))
    x[:, 2] = 0
    for method in ("wanda", "sparsegpt"):
        found = Form.parse(f"sparse24('{method}')").solve(weight, Stats.from_inputs(x)).to_dense()
        assert torch.equal(found[0], torch.tensor([9.0, 0.0, 0.0, 7.0]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparse24('all')", "unknown method 'all'"),
        ("sparse24('wnada')", "did you mean 'wanda'"),
        ("sparse24(damping=0)", "damping is 0.0, not positive; 0.01 would work"),
        ("sparse_nm(4, 4)", "4 of 4 is no pattern"),
        ("sparse_nm(0, 4)", "0 of 4 is no pattern"),
        ("sparse_nm(2)", "'of' is missing"),
        ("unstructured(1.5)", "not in (0, 1]; 0.5 would work"),
        ("column_sparse(0)", "not in (0, 1]; 0.5 would work"),
        ("sparse_low_rank(4, 2.0)", "density is 2.0"),
        ("sparse_low_rank", "one of rank=64"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(FormError) as caught:
        Form.parse(text)
    assert says in str(caught.value)


def test_a_density_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(FormError, match=r"keeps no value at density 0.01 at a.b; 0.0313 or more would work"):
        Form.parse("unstructured(0.01)").check((8, 16), "a.b")
    Form.parse("unstructured(0.0313)").check((8, 16))


@pytest.mark.parametrize("text", ["sparse24", "unstructured(0.5)", "column_sparse(0.5)"])
def test_a_damaged_sparse_operator_is_refused(text: str) -> None:
    operator = Form.parse(text).fit(torch.randn(4, 16))
    config, tensors = operator.config(), operator.tensors()
    (places,) = (name for name in tensors if name != "values.weight")
    for changed in (tensors[places][..., :-1], tensors[places].float()):
        with pytest.raises(FormError, match="is needed"):
            Operator.from_config(config, {**tensors, places: changed})
    with pytest.raises(FormError, match="missing"):
        Operator.from_config({k: v for k, v in config.items() if k != "features"}, tensors)
    with pytest.raises(FormError):
        Operator.from_config({**config, "children": {}}, tensors)
    if text == "sparse24":
        for change in ({"keep": 0}, {"keep": 3}, {"of": 300}, {"features": 0}):
            with pytest.raises(FormError):
                Operator.from_config({**config, **change}, tensors)
        with pytest.raises(ValueError, match="values have shape"):
            NMSparse(Dense(torch.ones(4, 7)), tensors["indices"], 2, 4, 16)
