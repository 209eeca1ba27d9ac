"""The laws of forms, over the whole registry: a new file in passes/forms is tested here with no list edited."""

import itertools
import json
import math
import struct

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from safetensors.torch import load, save
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from recast.passes.errors_of import measured_errors, predicted_errors
from recast.passes.forms import Dense, Form, NamedForm, Operator, Quantized, Stats, forms, relative_error
from recast.passes.forms.gated import Gated, gates, ungated
from recast.passes.forms.rounded_inputs import RoundedInputs
from tests.helpers import assert_close

SHAPES = [(63, 60), (60, 63), (577, 64), (1, 37), (24, 48)]
SQUARE = (36, 36)  # for forms that are square only
COMPOSITES = [
    "low_rank(ratio=0.5) | int8",
    "int4(group=32) + low_rank(rank=4)",
    "low_rank(rank=3) + block_diagonal(3)",
    "block_diagonal(3) @ int4 @ block_diagonal(3)",
    "block_diagonal(3) @ block_diagonal(3)",
    "dense @ low_rank(2)",
    "block_diagonal(3) | int8(activations=true)",
    "low_rank(6) | int4(symmetric=false)",
    "low_rank(8) | int8(activations=true)",
    "(low_rank(4) + block_diagonal(3)) | int8",
    "low_rank(9) | (int4 + low_rank(1))",
    "low_rank(energy=0.5) | int8",
    "wina(0.5) | int4",
    "low_rank(8) | teal(0.3)",
]


def cases(
    shapes: list[tuple[int, int]], count: int, composites: dict[tuple[int, int], list[str]]
) -> list[ParameterSet]:
    """Every form's examples at the first so many of the shapes that it can take."""
    found: list[tuple[Form, tuple[int, int]]] = []
    for cls in forms().values():
        possible = [shape for shape in shapes if cls.examples(shape)] or [SQUARE]
        found += [(form, shape) for shape in possible[:count] for form in cls.examples(shape)]
    found += [(Form.parse(text), shape) for shape, texts in composites.items() for text in texts]
    return [pytest.param(form, shape, id=f"{form} {shape[0]}x{shape[1]}") for form, shape in found]


EVERY = cases(SHAPES, len(SHAPES), {(24, 48): COMPOSITES, (63, 60): COMPOSITES[:4]})
SOME = cases(SHAPES, 1, {(24, 48): COMPOSITES})
BOTH = cases([(63, 60), (24, 48), *SHAPES], 2, {(24, 48): COMPOSITES[:4]})
# The numbers at every shape; what depends on the structure rather than on sizes, at one.
every = pytest.mark.parametrize(("form", "shape"), EVERY)
some = pytest.mark.parametrize(("form", "shape"), SOME)


def make_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    m, n = shape
    # A falling spectrum, and a few large values.
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    weight += (
        3
        * torch.randn(m, 1, generator=generator, dtype=torch.float64)
        @ torch.randn(1, n, generator=generator, dtype=torch.float64)
    )
    weight[0, 0] = 20.0
    return weight.to(dtype)


def make_inputs(n: int, tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix.T


def rounds_activations(operator: Operator) -> bool:
    if isinstance(operator, RoundedInputs) or (isinstance(operator, Quantized) and operator.activations):
        return True
    return any(rounds_activations(child) for child in operator.children().values())


def gated(operator: Operator, x: Tensor) -> Tensor:
    """What an operator with gates must give: at each gate x with zeros for what the published rule leaves out, then the matrix."""
    if isinstance(operator, Gated):
        score = x.abs().to(torch.promote_types(x.dtype, torch.float32))
        if operator.norms is not None:
            score = score * operator.to_dense().to(score.dtype).norm(dim=0)
        rank = (score.unsqueeze(-2) > score.unsqueeze(-1)).sum(-1)  # how many of the same token score higher
        mask = rank < operator.kept if operator.threshold is None else score > operator.threshold
        return gated(operator.weight, x * mask)
    if not gates(operator):
        return x @ operator.to_dense().to(x.dtype).T
    children = operator.children()
    assert set(children) == {"left", "right"}
    return gated(children["left"], gated(children["right"], x))


def holds_values(operator: Operator) -> bool:
    """Whether there is anything to multiply with: not so for a permutation, which has no zero either."""
    return any(tensor.is_floating_point() for tensor in operator.tensors().values())


@pytest.fixture(scope="module")
def fitted() -> dict[tuple[str, tuple[int, int]], Operator]:
    return {}


def fit(fitted: dict[tuple[str, tuple[int, int]], Operator], form: Form, shape: tuple[int, int]) -> Operator:
    key = (str(form), shape)
    if key not in fitted:
        fitted[key] = form.fit(make_weight(shape))
    return fitted[key]


Fitted = dict[tuple[str, tuple[int, int]], Operator]


@every
def test_apply_is_the_product_with_the_dense_matrix(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    operator = fit(fitted, form, shape)
    assert operator.shape == shape
    dense = operator.to_dense()
    assert dense.shape == shape
    assert dense.dtype == operator.dtype == torch.float32
    for batch in [(), (1,), (2, 5), (0,)]:
        x = torch.randn(*batch, shape[1])
        actual, expected = operator.apply(x), x @ dense.T
        if gates(operator):
            # The matrix is the one without gates; with them only what is left out is missing.
            assert_close(ungated(operator).apply(x), expected, terms=4 * shape[1])
            assert_close(actual, gated(operator, x), terms=4 * shape[1])
            if isinstance(operator, Gated) and x.numel():
                lost = (x * ~operator.mask(x)).abs() @ dense.abs().T
                assert bool(((actual - expected).abs() <= lost + 1e-5 * x.abs() @ dense.abs().T).all())
                assert operator.mask(x).sum(-1).unique().tolist() == [operator.kept]
        elif not rounds_activations(operator):
            assert_close(actual, expected, terms=4 * shape[1])
        elif isinstance(operator, Quantized) and x.numel():
            # Each input is off by a step at most (half for itself, half for the zero point at the ends of the range); the
            # exact integer result is checked with the kernel.
            axes = (-1,) if operator.per_token else tuple(range(x.dim()))
            step = (x.amax(axes, keepdim=True).clamp_min(0) - x.amin(axes, keepdim=True).clamp_max(0)) / 255
            assert bool(((actual - expected).abs() <= step * dense.abs().sum(1) * (1 + 1e-4)).all())
        elif isinstance(operator, RoundedInputs):
            # Which numbers inputs are rounded to is checked on its own.
            assert_close(actual, operator.rounded(x) @ dense.T, terms=4 * shape[1])
        elif x.numel():
            # Independent roundings of all inputs, each of relative size 1/127 at most, one for each stage.
            assert float((actual - expected).norm()) <= 0.03 * float(x.norm()) * float(
                torch.linalg.matrix_norm(dense, 2)
            )
    half = operator.to(torch.bfloat16)
    assert half.apply(torch.randn(2, shape[1], dtype=torch.bfloat16)).dtype == half.to_dense().dtype == torch.bfloat16


@some
def test_fit_of_its_own_matrix_is_a_fixed_point(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    if not isinstance(form, NamedForm) or not form.fixed_point:
        pytest.skip("alternating fits and fits to an energy are no projections")
    dense = fit(fitted, form, shape).to_dense()
    again = form.fit(dense).to_dense()
    assert_close(again, dense, terms=shape[1])
    # With data that sees every direction, too.
    again = form.fit(dense, Stats.from_inputs(make_inputs(shape[1]))).to_dense()
    assert_close(again, dense, terms=shape[1], factor=100)


@pytest.mark.parametrize("data", [False, True], ids=["plain", "data"])
@pytest.mark.parametrize("shape", [(63, 60), (1, 37)], ids=str)
@pytest.mark.parametrize("name", list(forms()))
def test_error_never_rises_with_budget(name: str, shape: tuple[int, int], data: bool) -> None:
    weight = make_weight(shape)
    stats = Stats.from_inputs(make_inputs(shape[1])) if data else None
    errors, sizes = [], []
    for form in forms()[name].ladder(shape):
        operator = form.fit(weight, stats)
        plain, output = relative_error(weight, operator, stats)
        if gates(operator):
            assert plain == 0  # nothing but the gate is in the way
            output = predicted_errors(weight, operator, stats)[1]
            assert output is not None
            assert output > 0
        errors.append(plain if output is None else output)
        sizes.append(operator.nbytes)
    assert sizes == sorted(sizes)
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors)), errors


@every
def test_bytes_are_what_the_tensors_hold(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    operator = fit(fitted, form, shape)
    file = save({name: tensor.contiguous() for name, tensor in operator.tensors().items()})
    (header,) = struct.unpack("<Q", file[:8])
    assert operator.nbytes == len(file) - 8 - header
    outline = form.outline(shape)
    if outline is not None:
        assert outline.nbytes == operator.nbytes
        assert outline.config() == operator.config()
        assert outline.cost(17) == operator.cost(17)
        assert {k: (v.shape, v.dtype) for k, v in outline.tensors().items()} == {
            k: (v.shape, v.dtype) for k, v in operator.tensors().items()
        }
    cost = operator.cost(17)
    if gates(operator):
        # Columns that no token wants are not read: fewer bytes the fewer tokens, and never more than all.
        assert operator.cost(0).bytes == 0
        reads = [operator.cost(t).bytes - t * sum(shape) * 4 for t in (1, 4, 17)]
        assert 0 < reads[0] <= reads[1] <= reads[2]
        assert reads[0] < operator.nbytes or not isinstance(operator, Gated)
        assert ungated(operator).cost(17).bytes >= ungated(operator).nbytes + 17 * sum(shape) * 4
    else:
        assert cost.bytes >= operator.nbytes + 17 * sum(shape) * 4
        assert operator.cost(0).bytes == operator.nbytes
    assert cost.flops > 0 or not holds_values(operator)


@some
def test_state_round_trips(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    operator = fit(fitted, form, shape)
    restored = Operator.from_config(
        json.loads(json.dumps(operator.config())),
        load(save({k: v.contiguous() for k, v in operator.tensors().items()})),
    )
    assert restored.config() == operator.config()
    x = torch.randn(3, shape[1])
    assert torch.equal(restored.apply(x), operator.apply(x))
    assert torch.equal(restored.to_dense(), operator.to_dense())
    same = operator.with_tensors(operator.tensors())
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(same.tensors().values(), operator.tensors().values(), strict=True)
    )


@some
def test_dense_leaves_are_there_where_the_form_says_so(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    assert fit(fitted, form, shape).has_dense_leaves() == form.dense_leaves


@some
def test_gradients_are_the_dense_ones(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    operator = fit(fitted, form, shape).to(torch.float64)
    floats = {k: v.double().requires_grad_() for k, v in operator.tensors().items() if v.is_floating_point()}
    operator = operator.with_tensors({**operator.tensors(), **floats})
    weighting = torch.randn(4, shape[0], dtype=torch.float64)

    def gradients(apply: object) -> list[Tensor]:
        x = torch.linspace(-1, 1, 4 * shape[1], dtype=torch.float64).reshape(4, -1).requires_grad_()
        y = operator.apply(x) if apply else gated(operator, x)
        # Which inputs are left out has no slope.
        held = [value for name, value in floats.items() if name.split(".")[-1] != "norms"]
        wanted = [x] if rounds_activations(operator) else [x, *held]
        return list(torch.autograd.grad((y * weighting).sum(), wanted))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(actual, expected, terms=8 * max(shape))


@some
def test_traces_with_a_symbolic_batch(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    operator = fit(fitted, form, shape)
    tensors = operator.tensors()

    def run(x: Tensor, held: dict[str, Tensor]) -> Tensor:
        return operator.with_tensors(held).apply(x)

    # As a backend sees it: sizes of the input symbolic, those of the weights not.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake_x = mode.from_tensor(torch.randn(13, 17, shape[1]), symbolic_context=sizes)
    fakes = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in tensors.items()}
    with mode:
        traced = make_fx(run, tracing_mode="symbolic")(fake_x, fakes)
    assert not mode.shape_env.guards, "the batch was specialised"
    for batch in [(2, 7), (4, 2)]:
        x = torch.randn(*batch, shape[1])
        assert_close(traced(x, tensors), operator.apply(x), terms=4 * shape[1])


@some
def test_reported_error_is_the_measured_one(fitted: Fitted, form: Form, shape: tuple[int, int]) -> None:
    weight, inputs = make_weight(shape), make_inputs(shape[1])
    operator = fit(fitted, form, shape)
    plain, output = relative_error(weight, operator, Stats.from_inputs(inputs))
    gap = (weight.double() - operator.to_dense().double()).numpy()
    exact = weight.double().numpy()
    x = inputs.numpy().T
    assert math.isclose(plain, float((gap**2).sum() / (exact**2).sum()) ** 0.5, rel_tol=1e-9, abs_tol=1e-12)
    measured = float(((gap @ x) ** 2).sum() / ((exact @ x) ** 2).sum()) ** 0.5
    assert output is not None
    assert math.isclose(output, measured, rel_tol=1e-6, abs_tol=1e-7)
    if gates(operator):
        # What the inputs that are left out would have added is not in the matrix: it is measured on the sample.
        stats = Stats.from_inputs(inputs, sample=len(inputs))
        found = predicted_errors(weight, operator.to(torch.float64), stats)[1]
        assert found == measured_errors(weight, operator.to(torch.float64), stats)
        wide = gated(operator.to(torch.float64), inputs).numpy().T
        lost = float(((wide - exact @ x) ** 2).sum() / ((exact @ x) ** 2).sum()) ** 0.5
        assert found is not None
        assert math.isclose(found, lost, rel_tol=1e-6, abs_tol=1e-7)


@pytest.mark.parametrize(
    ("form", "shape", "data"),
    [pytest.param(*case.values, "full", id=f"{case.id}-full") for case in BOTH]
    + [pytest.param(*case.values, data, id=f"{case.id}-{data}") for data in ("few", "dead") for case in SOME],
)
def test_data_aware_is_never_worse_on_the_data(fitted: Fitted, form: Form, shape: tuple[int, int], data: str) -> None:
    weight = make_weight(shape)
    inputs = make_inputs(shape[1], tokens=max(1, shape[1] // 3) if data == "few" else 300)
    if data == "dead":
        inputs[:, ::4] = 0
    stats = Stats.from_inputs(inputs)
    aware, free = form.fit(weight, stats), fit(fitted, form, shape)
    assert bool(torch.isfinite(aware.to_dense()).all())
    with_data, without = relative_error(weight, aware, stats)[1], relative_error(weight, free, stats)[1]
    assert with_data is not None
    assert without is not None
    if aware.nbytes == free.nbytes:
        assert with_data <= without + 1e-6
    else:  # a share of the energy is asked for, of the data's or of the weight's
        assert aware.config().keys() == free.config().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(forms()))
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    shape = (24, 48) if forms()[name].examples((24, 48)) else SQUARE
    weight = make_weight(shape, dtype)
    for form in forms()[name].examples(shape):
        operator = form.fit(weight)
        assert operator.dtype == operator.to_dense().dtype == dtype
        x = torch.randn(3, shape[1], dtype=dtype)
        y = operator.apply(x)
        assert y.dtype == dtype
        if gates(operator):
            assert_close(y, gated(operator.to(torch.float64), x.double()), terms=48)
        elif not rounds_activations(operator):
            assert_close(y, x.double() @ operator.to_dense().double().T, terms=48)
        wide = relative_error(weight, form.fit(weight.double()))[0]
        assert abs(relative_error(weight, operator)[0] - wide) <= 4 * torch.finfo(dtype).eps ** 0.5


@some
def test_bad_weights_are_refused(form: Form, shape: tuple[int, int]) -> None:
    from recast.patterns.errors import WeightError

    weight = make_weight(shape)
    weight[0, -1] = torch.nan
    with pytest.raises(WeightError, match=r"NaN or infinite, the first at \[0, "):
        form.fit(weight, where="layers.0.mlp")
    with pytest.raises(WeightError, match=r"layers\.0\.mlp is torch.int32, not floating"):
        form.fit(torch.ones(shape, dtype=torch.int32), where="layers.0.mlp")
    for zero in (torch.zeros(shape), torch.full(shape, 3.0)):
        operator = form.fit(zero, Stats.from_inputs(torch.zeros(2, shape[1])))
        assert bool(torch.isfinite(operator.to_dense()).all())
        if not zero.any() and holds_values(operator):
            assert not operator.to_dense().any()


def test_the_leaves_are_named(fitted: Fitted) -> None:
    operator = Form.parse("low_rank(2) + block_diagonal(2) @ dense").fit(make_weight((4, 6)))
    seen: list[str] = []

    def note(leaf: Dense, path: str) -> Operator:
        seen.append(path)
        return leaf

    assert operator.map_leaves(note).config() == operator.config()
    assert seen == ["0.right", "0.left", "1.right", "1.left.0", "1.left.1"]
