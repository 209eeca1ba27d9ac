"""Fits against solutions derived anew in numpy and scipy, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recast.passes.forms import (
    BlockDiagonal,
    Dense,
    DirectSum,
    Form,
    Product,
    Quantized,
    Stats,
    Sum,
    relative_error,
)
from recast.passes.forms.linear_algebra import best_left, leading_subspace
from recast.patterns.errors import CalibrationError, FormError
from tests.helpers import assert_close

SHAPES = [(20, 30), (30, 20), (25, 25), (1, 9), (200, 300), (300, 150)]


def inputs(n: int, tokens: int, condition: float = 1e3) -> Tensor:
    mix = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(0, -np.log10(condition), n) @ mix.T


def output_error(weight: Tensor, dense: Tensor, x: Tensor) -> float:
    return float(np.linalg.norm((weight - dense).numpy() @ x.numpy().T))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_whitened_low_rank_loses_the_tail_of_the_spectrum(shape: tuple[int, int], condition: float) -> None:
    m, n = shape
    weight, x = torch.randn(m, n, dtype=torch.float64), inputs(n, 4 * n, condition)
    # SVD-LLM as published: the Cholesky factor of the Gram matrix, the SVD of W S, the inverse of S.
    root = scipy.linalg.cholesky((x.T @ x).numpy(), lower=True)
    sigma = scipy.linalg.svdvals(weight.numpy() @ root)
    for rank in sorted({1, max(1, min(shape) // 3), min(shape)}):
        operator = Form.parse(f"low_rank({rank})").fit(weight, Stats.from_inputs(x))
        assert operator.tensors()["left.weight"].shape == (m, rank)
        expected = float(np.sqrt((sigma[rank:] ** 2).sum()))
        actual = output_error(weight, operator.to_dense(), x)
        assert abs(actual - expected) <= 1e-6 * expected + 1e-9 * sigma[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_low_rank_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    u, sigma, vt = scipy.linalg.svd(weight.numpy(), full_matrices=False)
    rank = max(1, min(shape) // 2)
    operator = Form.parse(f"low_rank({rank})").fit(weight)
    assert_close(operator.to_dense(), torch.from_numpy((u[:, :rank] * sigma[:rank]) @ vt[:rank]), terms=10**4)
    # The roots of the singular values are split evenly.
    left = operator.tensors()["left.weight"]
    assert_close(left.T @ left, torch.diag(torch.from_numpy(sigma[:rank].copy())), terms=10**4)


def test_float32_weights_keep_the_accuracy_of_the_fit() -> None:
    weight, x = torch.randn(256, 128), inputs(128, 1000, 1e4)
    sigma = scipy.linalg.svdvals(weight.double().numpy() @ x.T.numpy())
    operator = Form.parse("low_rank(40)").fit(weight, Stats.from_inputs(x))
    expected = float(np.sqrt((sigma[40:] ** 2).sum()))
    assert abs(output_error(weight.double(), operator.to_dense().double(), x) / expected - 1) < 1e-6


def test_both_gram_variants_agree() -> None:
    weight, x = torch.randn(30, 30, dtype=torch.float64), inputs(30, 100)
    # Rows of zeros change the side that is the smaller one, and nothing else.
    taller = torch.cat([weight, torch.zeros(5, 30, dtype=torch.float64)])
    one, other = leading_subspace(weight, x.T @ x, rank=7), leading_subspace(taller, x.T @ x, rank=7)
    assert_close(other[:30] @ other[:30].T, one @ one.T, terms=10**6)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_rank_deficient_statistics(shape: tuple[int, int], tokens: int) -> None:
    weight, x = torch.randn(shape, dtype=torch.float64), inputs(shape[1], tokens, 1.0)
    stats = Stats.from_inputs(x)
    sigma = scipy.linalg.svdvals(weight.numpy() @ x.numpy().T)
    operator = Form.parse("low_rank(12)").fit(weight, stats)
    expected = float(np.sqrt((sigma[12:] ** 2).sum()))
    assert abs(output_error(weight, operator.to_dense(), x) - expected) <= 1e-6 * sigma[0]
    if tokens < 12:
        # The directions that the data leaves free go to the weight: no worse there than what is left by the first ones.
        kept = Form.parse(f"low_rank({tokens})").fit(weight, stats)
        assert relative_error(weight, operator)[0] < relative_error(weight, kept)[0] - 0.05


def test_energy_keeps_the_least_rank_that_suffices() -> None:
    weight, x = torch.randn(20, 30, dtype=torch.float64), inputs(30, 100)
    sigma2 = scipy.linalg.svdvals(weight.numpy() @ x.numpy().T) ** 2
    share = np.cumsum(sigma2) / sigma2.sum()
    for energy in (0.5, 0.9, 0.999):
        operator = Form.parse(f"low_rank(energy={energy})").fit(weight, Stats.from_inputs(x))
        assert operator.tensors()["left.weight"].shape[1] == int((share < energy).sum()) + 1
    assert Form.parse("low_rank(energy=1.0)").fit(weight).tensors()["left.weight"].shape[1] == 20


def test_ratio_counts_parameters() -> None:
    for ratio in (0.1, 0.5, 1.0):
        operator = Form.parse(f"low_rank(ratio={ratio})").fit(torch.randn(64, 96))
        held = sum(tensor.numel() for tensor in operator.tensors().values())
        assert ratio * 64 * 96 - (64 + 96) < held <= ratio * 64 * 96


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (10, 10)], ids=str)
def test_block_diagonal_is_the_least_squares_solution(shape: tuple[int, int]) -> None:
    (m, n), b = shape, 5
    weight, x = torch.randn(m, n, dtype=torch.float64), inputs(n, 200)
    operator = Form.parse(f"block_diagonal({b})").fit(weight, Stats.from_inputs(x))
    assert isinstance(operator, BlockDiagonal)
    for i in range(b):
        rows, columns = slice(i * m // b, (i + 1) * m // b), slice(i * n // b, (i + 1) * n // b)
        expected = np.linalg.lstsq(x[:, columns].numpy(), (x @ weight[rows].T).numpy(), rcond=None)[0].T
        assert_close(operator.blocks[i], torch.from_numpy(expected), terms=10**9)
    plain = Form.parse(f"block_diagonal({b})").fit(weight).to_dense()
    mask = torch.block_diag(*[torch.ones(m // b, n // b)] * b)  # type: ignore[no-untyped-call]
    assert torch.equal(plain, weight * mask)


def test_int8_is_round_to_nearest() -> None:
    weight = torch.randn(7, 33)
    operator = Form.parse("int8").fit(weight)
    w = weight.double().numpy()
    scale = np.abs(w).max(1, keepdims=True) / 127
    assert_close(operator.to_dense(), torch.from_numpy(np.round(w / scale) * scale), terms=1)
    assert float((operator.to_dense() - weight).abs().max()) <= float(scale.max()) / 2 * (1 + 1e-5)


@pytest.mark.parametrize("group", [4, 10, 33, 64])
def test_int4_is_the_best_of_its_clippings(group: int) -> None:
    weight = torch.randn(6, 33, dtype=torch.float64)
    weight[0, 3] = 9.0
    fitted = Form.parse(f"int4(group={group})").fit(weight).to_dense()
    for start in range(0, 33, group):
        part = weight[:, start : start + group].numpy()
        top = np.abs(part).max(1, keepdims=True)
        tried = []
        for shrink in (1.0, 0.95, 0.9, 7 / 8, 0.825, 0.775, 0.725, 0.675):
            scale = top / 7 * shrink
            tried.append(((np.clip(np.round(part / scale), -8, 7) * scale - part) ** 2).sum(1))
        actual = ((fitted[:, start : start + group].numpy() - part) ** 2).sum(1)
        assert np.allclose(actual, np.min(tried, axis=0), rtol=1e-9)


def test_asymmetric_codes_pay_where_a_group_is_one_sided() -> None:
    weight = torch.rand(16, 64) + 1
    symmetric, asymmetric = (Form.parse(f"int4(32, {word})").fit(weight) for word in ("true", "false"))
    assert isinstance(asymmetric, Quantized)
    assert asymmetric.zero is not None
    assert asymmetric.zero.dtype == torch.uint8
    # Zero stays representable: half the range is still spent below 1, but no longer half the codes below 0.
    assert relative_error(weight, asymmetric)[0] < 0.6 * relative_error(weight, symmetric)[0]


def test_best_left_is_least_squares() -> None:
    weight, x = torch.randn(9, 14, dtype=torch.float64), inputs(14, 60)
    right = Dense(torch.randn(5, 14, dtype=torch.float64))
    seen = (x @ right.weight.T).T @ (x @ right.weight.T)
    expected = np.linalg.lstsq((x @ right.weight.T).numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    assert_close(best_left(weight, right, Stats.from_inputs(x), seen), torch.from_numpy(expected), terms=10**6)


@pytest.mark.parametrize("data", [False, True])
def test_correction_of_a_quantized_weight(data: bool) -> None:
    weight, x = torch.randn(48, 64), inputs(64, 300)
    stats = Stats.from_inputs(x) if data else None

    def error(text: str) -> float:
        found = relative_error(weight, Form.parse(text).fit(weight, stats), Stats.from_inputs(x))
        return float(found[1] if data else found[0])  # type: ignore[arg-type]

    both = Form.parse("int4 + low_rank(8)").fit(weight, stats)
    assert isinstance(both, Sum)
    swapped = Form.parse("low_rank(8) + int4").fit(weight, stats)
    # The order of the terms says nothing but the order of the operators.
    assert isinstance(swapped, Sum)
    assert torch.equal(both.terms[0].to_dense(), swapped.terms[1].to_dense())
    assert torch.equal(both.terms[1].to_dense(), swapped.terms[0].to_dense())
    # Never worse than quantizing once and correcting once (LoRC), which is where it starts.
    quantized = Form.parse("int4").fit(weight, stats)
    once = Sum((quantized, Form.parse("low_rank(8)").fit(weight - quantized.to_dense(), stats)))
    found = relative_error(weight, once, Stats.from_inputs(x))
    assert error("int4 + low_rank(8)") <= float(found[1] if data else found[0]) + 1e-9  # type: ignore[arg-type]
    assert error("int4 + low_rank(8)") < 0.8 * error("int4")
    assert error("int4 + low_rank(16)") < error("int4 + low_rank(8)")


def test_products_are_never_worse_than_their_starts() -> None:
    weight = torch.randn(24, 24)
    form = Form.parse("block_diagonal(4) @ int4 @ block_diagonal(4)")
    operator = form.fit(weight)
    assert isinstance(operator, Product)
    assert isinstance(operator.left, BlockDiagonal)
    assert relative_error(weight, operator)[0] <= relative_error(weight, Form.parse("int4").fit(weight))[0]
    exact = torch.block_diag(*torch.randn(4, 6, 6)) @ torch.block_diag(*torch.randn(2, 12, 12))  # type: ignore[no-untyped-call]
    found = relative_error(exact, Form.parse("block_diagonal(4) @ block_diagonal(2)").fit(exact))[0]
    assert found < 0.05


def test_a_product_of_carriers_has_the_smaller_side_within() -> None:
    operator = Form.parse("dense @ block_diagonal(2) @ dense").fit(torch.randn(6, 10))
    shapes = {name: tuple(tensor.shape) for name, tensor in operator.tensors().items()}
    assert shapes == {"left.weight": (6, 6), "right.left.blocks": (2, 3, 3), "right.right.weight": (6, 10)}


def test_a_pipe_refits_every_dense_factor() -> None:
    weight, x = torch.randn(24, 36), inputs(36, 200)
    operator = Form.parse("low_rank(10) | int4(group=6)").fit(weight, Stats.from_inputs(x))
    assert isinstance(operator, Product)
    assert isinstance(operator.left, Quantized)
    assert isinstance(operator.right, Quantized)
    # The left factor makes up for the rounding of the right one: better than rounding both for themselves.
    halves = Form.parse("low_rank(10)").fit(weight, Stats.from_inputs(x))
    alone = halves.map_leaves(lambda leaf, _: Form.parse("int4(group=6)").fit(leaf.weight))
    errors = [relative_error(weight, found, Stats.from_inputs(x))[1] for found in (operator, alone)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]
    blocks = Form.parse("block_diagonal(3) | int8").fit(weight)
    assert isinstance(blocks, DirectSum)
    assert len(blocks.parts) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block_diagonal(5)", r"does not split into 5 blocks \(48 % 5 = 3\) at layers.0; 4 or 8 would"),
        ("low_rank(49)", "has rank at most 48, asked 49 at layers.0; 48 or less would work, 27 or less saves"),
        ("low_rank(ratio=0.001)", "keeps no rank at ratio 0.001 at layers.0; ratio 0.0365 or more would work"),
        ("low_rank(ratio=4.0)", "ratio 1.75 or less would work"),
        ("int8 + block_diagonal(7)", "8 would"),
        ("low_rank(4) | block_diagonal(8)", "at the factor right of layers.0; 4 would"),
        ("low_rank(4) @ low_rank(60)", "48 or less"),
    ],
)
def test_shapes_are_checked_before_any_work(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text).check((48, 64), "layers.0")
    with pytest.raises(FormError, match=says):
        Form.parse(text).fit(torch.full((48, 64), torch.nan), where="layers.0")


@pytest.mark.parametrize("text", ["low_rank(ratio=0.0365)", "low_rank(ratio=1.75)", "block_diagonal(8)"])
def test_what_the_messages_suggest_works(text: str) -> None:
    Form.parse(text).check((48, 64))


def test_bad_statistics_are_refused() -> None:
    good = Stats.from_inputs(torch.randn(5, 8))
    form = Form.parse("low_rank(2)")
    with pytest.raises(CalibrationError, match="takes 6 features; they belong to another weight"):
        form.fit(torch.randn(4, 6), good, where="a.b")
    with pytest.raises(CalibrationError, match="not finite"):
        form.fit(torch.randn(4, 8), Stats(torch.full((8, 8), torch.inf), good.mean, good.absmax, 5))
    with pytest.raises(CalibrationError, match=r"sample at a.b is not finite"):
        form.fit(torch.randn(4, 8), replace(good, sample=torch.full((2, 8), torch.nan)), where="a.b")
    with pytest.raises(CalibrationError, match="row_importance holds -1; sums of squares, zero or more, would work"):
        form.fit(torch.randn(4, 8), replace(good, row_importance=-torch.ones(4)))
    with pytest.raises(CalibrationError, match=r"^a\.b: fwsvd.*importances .* are needed"):
        Form.parse("fwsvd(2)").fit(torch.randn(4, 8), good, where="a.b")
    with pytest.raises(CalibrationError, match="not finite"):
        Stats.from_inputs(torch.tensor([[torch.nan]]))
    with pytest.raises(CalibrationError, match="not one input vector"):
        Stats.from_inputs(torch.zeros(0, 3))


@pytest.mark.parametrize("seed", range(4))
def test_factors_of_a_product_stay_within_half_precision(seed: int) -> None:
    """A first factor of rank one leaves the second with directions of rounding alone, which a solve would blow up."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(63, 60, generator=generator).half()
    operator = Form.parse("low_rank(1) @ low_rank(8)").fit(weight)
    best = torch.linalg.svdvals(weight.double())[1:].square().sum()
    left = (operator.to_dense().double() - weight.double()).square().sum()
    assert float(left) <= 1.001 * float(best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["block_diagonal(1) @ low_rank(8)", "block_diagonal(2) @ low_rank(8)"])
def test_a_product_in_16_bits_is_not_fitted_to_its_own_rounding(text: str, dtype: torch.dtype) -> None:
    """What rounding adds to a product of rank eight has full rank: a factor solved for on it would have huge values."""
    weight = torch.randn(578, 64).to(dtype)
    operator, wide = (Form.parse(text).fit(held) for held in (weight, weight.float()))
    found, exact = (float((o.to_dense().double() - weight.double()).norm()) for o in (operator, wide))
    assert found <= (1 + 4 * torch.finfo(dtype).eps) * exact
    x = torch.randn(9, 64).to(dtype)
    assert_close(operator.apply(x), x.double() @ operator.to(torch.float64).to_dense().T, terms=64)
