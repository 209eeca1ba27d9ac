"""Forms around other forms: scaled inputs, inputs left out, corrections. Held to what their papers define, in numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recast.passes.errors_of import measured_errors, predicted_errors
from recast.passes.forms import Form, Operator, Product, Quantized, Stats, Sum, relative_error
from recast.passes.forms.column_sparse import ColumnSparse
from recast.passes.forms.diagonal import Diagonal
from recast.patterns.errors import FormError
from tests.helpers import assert_close


def uneven(n: int, tokens: int = 300, large: float = 20.0) -> Tensor:
    return torch.randn(tokens, n, dtype=torch.float64) * torch.where(torch.arange(n) % 16 == 3, large, 1.0)


def output_error(weight: Tensor, operator: Operator, x: Tensor) -> float:
    gap = (weight.double() - operator.to_dense().double()).numpy() @ x.double().numpy().T
    return float(np.linalg.norm(gap) / np.linalg.norm(weight.double().numpy() @ x.double().numpy().T))


def test_awq_takes_the_best_power_of_the_mean_size() -> None:
    weight, x = torch.randn(24, 48, dtype=torch.float64), uneven(48)
    stats = Stats.from_inputs(x, sample=len(x))
    operator = Form.parse("awq('int4(group=16, symmetric=false)')").fit(weight, stats)
    assert isinstance(operator, Product)
    assert isinstance(operator.right, Diagonal)
    size = np.abs(x.numpy()).mean(0)
    errors = []
    for i in range(20):
        s = size ** (i / 20)
        s = torch.from_numpy(s / np.sqrt(s.max() * s.min()))
        scaled = Stats.from_inputs(x / s)
        q = Form.parse("int4(group=16, symmetric=false)").fit(weight * s, scaled).to_dense() / s
        errors.append(np.linalg.norm((weight - q).numpy() @ x.numpy().T) / np.linalg.norm(weight.numpy() @ x.numpy().T))
    assert_close(torch.tensor(output_error(weight, operator, x)), torch.tensor(min(errors)), terms=weight.numel())
    assert min(errors) < 0.95 * errors[0]


@pytest.mark.parametrize("base", ["int3(group=24)", "int4(group=24)"])
def test_awq_and_gptq_are_below_rounding_and_go_together(base: str) -> None:
    weight, x = torch.randn(64, 96), uneven(96) @ (torch.eye(96) + 0.1 * torch.randn(96, 96)).double()
    stats = Stats.from_inputs(x)
    with_gptq = base.replace(")", ", rounding='gptq')")
    texts = [base, f"awq('{base}')", with_gptq, 'awq("' + with_gptq + '")']
    nearest, awq, gptq, both = (output_error(weight, Form.parse(text).fit(weight, stats), x) for text in texts)
    assert awq < 0.97 * nearest
    assert gptq < nearest
    assert both < awq


def test_smoothquant_divides_by_the_published_factors() -> None:
    weight, x = torch.randn(24, 48), uneven(48, large=100.0)
    operator = Form.parse("smoothquant").fit(weight, Stats.from_inputs(x, sample=len(x)))
    assert isinstance(operator, Product)
    assert isinstance(operator.right, Diagonal)
    assert isinstance(operator.left, Quantized)
    factor = np.sqrt(np.abs(x.numpy()).max(0)) / np.sqrt(np.abs(weight.double().numpy()).max(0))
    found = 1 / operator.right.values.double().numpy()
    assert_close(torch.from_numpy(found / found[0]).float(), torch.from_numpy(factor / factor[0]))
    # What it is for: the error with rounded inputs.
    plain = Form.parse("int8(activations=true)").fit(weight)
    wanted, small = x @ weight.double().T, x.float()
    errors = [float((made.apply(small).double() - wanted).norm()) for made in (operator, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    "text", ["smoothquant", "llm_int8", "int8(activations=true)", "low_rank(20) | int8(activations=true)"]
)
def test_predicted_errors_foresee_the_rounding_of_inputs(text: str) -> None:
    weight, x = torch.randn(40, 48), uneven(48, large=50.0)
    stats = Stats.from_inputs(x, sample=len(x))
    operator = Form.parse(text).fit(weight, stats)
    predicted, measured = predicted_errors(weight, operator, stats)[1], measured_errors(weight, operator, stats)
    assert predicted is not None
    assert measured is not None
    assert 0.8 < measured / predicted < 1.25


def test_large_inputs_are_left_out_of_the_rounding() -> None:
    weight, x = torch.randn(24, 48), uneven(48).clamp(-30, 30)
    x[:, torch.arange(48) % 16 != 3] = x[:, torch.arange(48) % 16 != 3].clamp(-5.9, 5.9)
    operator = Form.parse("llm_int8").fit(weight, Stats.from_inputs(x))
    assert isinstance(operator, Sum)
    rest, kept = operator.parts
    assert isinstance(rest, ColumnSparse)
    assert isinstance(kept, ColumnSparse)
    assert kept.columns.tolist() == [3, 19, 35]
    assert torch.equal(kept.to_dense()[:, 3::16], weight[:, 3::16])
    # The product of the paper, in numpy: scales of rows for the rounded part, exact for the others.
    left = np.delete(weight.double().numpy(), [3, 19, 35], 1)
    scale = np.abs(left).max(1, keepdims=True) / 127
    assert_close(rest.values.to_dense(), torch.from_numpy(np.round(left / scale) * scale))
    plain = Form.parse("int8(activations=true)").fit(weight)
    wanted, small = x @ weight.double().T, x.float()
    errors = [float((made.apply(small).double() - wanted).norm()) for made in (operator, plain)]
    assert errors[0] < 0.4 * errors[1]


def test_inputs_that_are_all_large_or_all_small() -> None:
    weight = torch.randn(6, 10)
    for size, parts in ((100.0, 1), (0.01, 1)):
        x = torch.full((5, 10), size)
        operator = Form.parse("llm_int8").fit(weight, Stats.from_inputs(x))
        assert isinstance(operator, Sum)
        assert len(operator.parts) == parts
        assert_close(operator.apply(x), x @ weight.T, terms=10, factor=1e5)  # eight bits


@pytest.mark.parametrize("tokens", [5, 400])
def test_the_correction_is_the_weighted_svd_of_what_rounding_lost(tokens: int) -> None:
    weight = torch.randn(20, 30, dtype=torch.float64)
    x = torch.randn(tokens, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64)
    stats = Stats.from_inputs(x)
    operator = Form.parse("lorc(4, 'int3(group=10)')").fit(weight, stats)
    rounded = Form.parse("int3(group=10)").fit(weight, stats).to_dense()
    sigma = scipy.linalg.svdvals((weight - rounded).numpy() @ x.numpy().T)
    expected = np.sqrt((sigma[4:] ** 2).sum())
    actual = np.linalg.norm((weight - operator.to_dense()).numpy() @ x.numpy().T)
    assert abs(actual - expected) <= 1e-6 * sigma[0]


@pytest.mark.parametrize("base", ["nf3", "nf2", "int3(group=32)"])
def test_turns_of_lq_go_beyond_one_correction(base: str) -> None:
    weight, x = torch.randn(64, 64), uneven(64)
    stats = Stats.from_inputs(x)
    plain, lorc, lq = (
        relative_error(weight, Form.parse(text).fit(weight, stats), stats)[1]
        for text in (base, f"lorc(8, '{base}')", f"lq(8, '{base}')")
    )
    assert plain is not None
    assert lorc is not None
    assert lq is not None
    assert lorc < 0.9 * plain
    assert lq < lorc


@pytest.mark.parametrize("bits", [2, 3])
def test_bytes_are_better_spent_on_a_correction_than_on_small_groups(bits: int) -> None:
    # On inputs of which a few directions are most of the data.
    weight = torch.randn(256, 256)
    x = torch.randn(600, 256, dtype=torch.float64)
    x += 5 * torch.randn(600, 6, dtype=torch.float64) @ torch.randn(6, 256, dtype=torch.float64)
    stats = Stats.from_inputs(x)
    plain, lorc, lq = (
        Form.parse(text).fit(weight, stats)
        for text in (f"int{bits}(group=16)", f"lorc(8, 'int{bits}(group=128)')", f"lq(8, 'int{bits}(group=128)')")
    )
    assert lq.nbytes == lorc.nbytes <= plain.nbytes
    errors = [output_error(weight, operator, x) for operator in (plain, lorc, lq)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_values_that_stick_out_are_kept_beside_coordinate_descent() -> None:
    # QuantEase with outliers: a sparse term and codes that take turns.
    weight, x = (
        torch.randn(32, 64),
        torch.randn(300, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64),
    )
    weight[torch.rand(32, 64) < 0.01] *= 15
    stats = Stats.from_inputs(x)
    alone, both = (
        relative_error(weight, Form.parse(text).fit(weight, stats), stats)[1]
        for text in ("int3(rounding='quantease')", "unstructured(0.01) + int3(rounding='quantease')")
    )
    assert alone is not None
    assert both is not None
    assert both < 0.7 * alone


@pytest.mark.parametrize("form", ["awq", "smoothquant", "llm_int8", "lorc(1)", "lq(1)"])
@pytest.mark.parametrize("shape", [(1, 40), (33, 17)], ids=str)
def test_awkward_weights_and_data(form: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        weight[:, 2], weight[0, 5:] = 0, 0
        for tokens in (1, 5, 100):
            x = 1e3 * uneven(shape[1], tokens)
            x[:, 3] = 0
            operator = Form.parse(form).fit(weight, Stats.from_inputs(x, sample=tokens))
            assert operator.dtype == dtype
            assert bool(torch.isfinite(operator.to_dense()).all())
            assert bool(torch.isfinite(operator.apply(torch.randn(2, shape[1]).to(dtype))).all())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("awq('int5')", r"awq: base 'int5' cannot be read: .*did you mean"),
        ("awq(grid=0)", "20 would work"),
        ("smoothquant(alpha=2.0)", "0.5 would work"),
        ("llm_int8(threshold=0.0)", "6.0 would work"),
        ("lorc(0)", "8 would work"),
        ("lq(turns=0)", "100 would work"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)


def test_shapes_are_checked_for_base_and_rank() -> None:
    with pytest.raises(FormError, match="has rank at most 4, asked 64"):
        Form.parse("lq").check((4, 8))
    with pytest.raises(FormError, match="4 would"):
        Form.parse("awq('kmeans(rows=5)')").check((12, 8))
