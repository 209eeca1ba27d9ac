"""Inputs rounded to float formats: the numbers of the format one by one, and what a product with them is."""

import numpy as np
import pytest
import torch
from torch import Tensor

import recast
from recast.kernels.quantized_matmul.floats import FloatGrid, float_tokens
from recast.passes.errors_of import measured_errors, predicted_errors, rounds
from recast.passes.forms import Form, Operator, Stats
from recast.passes.forms.fp4 import Fp4
from recast.passes.forms.fp8 import Fp8
from recast.passes.forms.levels import FloatLevels
from recast.passes.forms.minifloat import Minifloat
from recast.passes.forms.rounded_inputs import RoundedInputs, unrounded
from recast.patterns.errors import FormError
from tests.helpers import assert_close

FORMATS = [
    Fp8(activations=True),
    Fp8(kind="e5m2", activations=True),
    Fp4(activations=True),
    Minifloat(exponent=1, mantissa=0, activations=True),
    Minifloat(exponent=2, mantissa=3, activations=True),
    Minifloat(exponent=5, mantissa=2, activations=True),
    Minifloat(exponent=1, mantissa=6, activations=True),
]
formats = pytest.mark.parametrize("form", FORMATS, ids=str)


def numbers(form: FloatLevels) -> np.ndarray:
    """The numbers of a format that are not negative, in order; whether a mantissa is even shows in its place."""
    table = np.unique(np.abs(form.table().numpy()))
    found: np.ndarray = table / table.max() * form.grid().largest
    return found


def nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The nearest of the levels to each value, of two that are as near the one at an even place."""
    gaps = np.abs(np.abs(values)[..., None] - levels)
    least = gaps == gaps.min(-1, keepdims=True)
    even = least & (np.arange(len(levels)) % 2 == 0)
    place = np.where(least.sum(-1) > 1, even.argmax(-1), least.argmax(-1))
    found: np.ndarray = np.copysign(levels[place], values)
    return found


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_and_everything_between_is_rounded_as_the_format_says(
    form: FloatLevels, dtype: torch.dtype
) -> None:
    levels, grid = numbers(form), form.grid()
    assert np.array_equal(np.asarray(levels, np.float32), levels)  # exact in float32, so that halves are halves
    middle = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(np.float32(middle), np.float32(to)) for to in (0, np.inf)]
    near = [np.nextafter(np.float32(levels), np.float32(to)) for to in (0, np.inf)]
    points = np.concatenate([levels, middle, *beside, *near, np.random.default_rng(0).uniform(0, levels[-1], 500)])
    points = np.minimum(np.concatenate([points, -points]).astype(np.float32).astype(np.float64), levels[-1] * 1.01)
    found = grid.nearest(torch.from_numpy(points).to(dtype)).double().numpy()
    assert np.array_equal(np.abs(found), np.abs(nearest(points, levels)))
    assert np.array_equal(np.sign(found[found != 0]), np.sign(points[found != 0]))


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_those_of_torch(kind: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = torch.cat([torch.randn(5000) * top / 4, torch.logspace(-30, 15, 5000, base=2)]).clamp(-top, top)
    assert torch.equal(Fp8(kind=kind).grid().nearest(x), x.to(dtype).float())


@formats
def test_tokens_have_scales_of_their_own(form: FloatLevels) -> None:
    x = torch.randn(4, 3, 37, dtype=torch.float64) * torch.logspace(-6, 6, 12, dtype=torch.float64).reshape(4, 3, 1)
    x[0, 0] = 0
    values, scale = float_tokens(x, form.grid())
    levels = numbers(form)
    expected = np.abs(x.numpy()).max(-1, keepdims=True) / levels[-1]
    assert_close(scale, torch.from_numpy(expected))
    assert_close(values, torch.from_numpy(nearest(x.numpy() / np.where(expected == 0, 1, expected), levels)))
    assert not values[0, 0].any()
    assert float(scale[0, 0]) == 0


@formats
def test_a_product_is_that_of_rounded_inputs(form: FloatLevels) -> None:
    weight = torch.randn(11, 29)
    operator = form.fit(weight)
    assert isinstance(operator, RoundedInputs)
    plain = Form.parse(str(form).replace("activations=true", "activations=false")).fit(weight)
    assert torch.equal(operator.to_dense(), plain.to_dense())  # the weight is as without
    assert unrounded(operator) is operator.weight
    assert operator.nbytes == plain.nbytes
    for batch in ((), (1,), (3, 1), (3, 29), (0,)):
        x = torch.randn(*batch, 29)
        wide = x.double().numpy()
        scale = np.abs(wide).max(-1, keepdims=True) / form.grid().largest
        expected = nearest(wide / scale, numbers(form)) * scale @ operator.to_dense().double().numpy().T
        assert_close(operator.apply(x), torch.from_numpy(expected), terms=4 * 29)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@formats
def test_half_inputs_are_rounded_once(form: FloatLevels, dtype: torch.dtype) -> None:
    # Values of the format times scales have more digits than bfloat16: only what comes out is rounded to it.
    operator = form.fit(torch.randn(8, 40)).to(dtype)
    x = (torch.randn(5, 40) * 30).to(dtype)
    x[2] = 0
    found = operator.apply(x)
    assert found.dtype == dtype
    exact = operator.to(torch.float32).apply(x.float())
    assert_close(found, exact, terms=1)
    assert not found[2].any()
    leaf = x.clone().requires_grad_()
    given = operator.apply(leaf)
    assert given.dtype == dtype
    (gradient,) = torch.autograd.grad(given.float().sum(), leaf)
    assert_close(gradient, operator.to_dense().float().sum(0).expand(5, -1), terms=40)


def test_numbers_at_the_ends_of_what_floats_hold() -> None:
    operator = Fp4(activations=True).fit(torch.ones(1, 3))
    x = torch.tensor([[3e38, -3e38, 1e38], [1e-38, 0, 0], [1e-45, 0, 0], [-0.0, 0, 0]])
    found = operator.apply(x)
    assert_close(found[:2], torch.tensor([[1e38], [1e-38]]), terms=3)
    assert not found[3].any()
    assert bool(torch.isfinite(found).all())
    assert bool(operator.apply(torch.tensor([[torch.nan, 1, 2]])).isnan().all())


TEXTS = [
    "fp8(activations=true)",
    "fp4(activations=true)",
    "low_rank(20) | fp8(activations=true)",
    "fp4(activations=true) + low_rank(4)",
    "smoothquant('fp8(activations=true)')",
]


def parts(operator: Operator) -> list[Operator]:
    return [operator, *(part for child in operator.children().values() for part in parts(child))]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("sample", [300, 0])
def test_predicted_errors_foresee_the_rounding(text: str, sample: int) -> None:
    weight, x = torch.randn(40, 48), torch.randn(300, 48) * torch.logspace(0, 1, 48)
    stats = Stats.from_inputs(x, sample=sample)
    form = Form.parse(text)
    assert Form.parse(str(form)) == form
    operator = form.fit(weight, stats)
    assert rounds(operator)
    assert not rounds(unrounded(operator))
    assert any(isinstance(part, RoundedInputs) for part in parts(operator))
    predicted = predicted_errors(weight, operator, stats)[1]
    measured = measured_errors(weight, operator, Stats.from_inputs(x, sample=300))
    assert predicted is not None
    assert measured is not None
    assert 0.85 < measured / predicted < 1.15


def test_more_bits_lose_less() -> None:
    weight, x = torch.randn(40, 48), torch.randn(300, 48)
    lost = [
        measured_errors(weight, Form.parse(f"{name}(activations=true)").fit(weight), Stats.from_inputs(x, sample=300))
        for name in ("int8", "fp8", "fp4")
    ]
    assert lost == sorted(lost, key=lambda error: error or 0.0)
    assert (lost[-1] or 0.0) > 0.1  # far from what a site that computes its matrix may be off: verification must know


def test_verification_takes_the_matrix_for_what_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)).eval()
    program = recast.capture(model, (torch.randn(3, 5, 24),))
    recipe = {"default": "fp4(group=8, activations=true)", "allow_larger": True}
    after = recast.rewrite(program, recast.plan(program, recipe), pictures=False)
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        assert 0 < float((after(x) - model(x)).norm()) < 0.5 * float(model(x).norm())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fp4(kind='bitsandbytes', activations=true)", "'e2m1' would work"),
        ("nf4(activations=true)", "no parameter 'activations'"),
        ("fp8(activations=1)", "true or false"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(FormError, match=says):
        Form.parse(text)


def test_a_format_is_kept_in_the_state() -> None:
    operator = Minifloat(exponent=3, mantissa=2, activations=True).fit(torch.randn(4, 7))
    assert isinstance(operator, RoundedInputs)
    again = Operator.from_config(operator.config(), operator.tensors())
    assert isinstance(again, RoundedInputs)
    assert again.grid == operator.grid == FloatGrid(2, -2, 28.0)


def test_positions_of_parameters_are_as_they_were() -> None:
    assert Form.parse("fp8(64, true)") == Fp8(group=64, double=True)
    assert Form.parse("minifloat(3, 2, 16)") == Minifloat(exponent=3, mantissa=2, group=16)
    assert isinstance(Fp8().fit(torch.ones(2, 2)), Operator)


def test_inputs_keep_their_gradient_under_no_grad_and_weights_theirs() -> None:
    operator = Fp8(activations=True).fit(torch.randn(3, 5))
    x = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        plain: Tensor = operator.apply(x)
    assert_close(operator.apply(x).detach(), plain, terms=5)
    tensors = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in operator.tensors().items()}
    operator.with_tensors(tensors).apply(x.detach()).sum().backward()
    assert all(t.grad is not None for t in tensors.values() if t.is_floating_point())
