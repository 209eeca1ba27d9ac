"""Int8 products with a grid for the inputs that is chosen in calibration."""

import pytest
import torch
from torch import nn

import recast
from recast.kernels.quantized_matmul.reference import quantize_inputs
from recast.lowering.dynamic_int8 import dynamic_int8
from recast.passes.errors_of import measured_errors, predicted_errors
from recast.passes.forms import Form, Quantized
from recast.passes.forms.scaled import scaled_stats
from recast.passes.forms.static_inputs import static_grid
from recast.passes.forms.stats import Stats
from recast.patterns.errors import CalibrationError, FormError
from tests.helpers import assert_close

STATIC = "int8(activations=true, static=true)"


def inputs(tokens: int, features: int) -> torch.Tensor:
    """Numbers with a tail on one side, as behind an activation function."""
    return torch.nn.functional.gelu(3 * torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens)))


def fitted(form: str, weight: torch.Tensor, x: torch.Tensor) -> Quantized:
    operator = Form.parse(form).fit(weight, Stats.from_inputs(x, sample=len(x)))
    assert isinstance(operator, Quantized)
    return operator


@pytest.mark.parametrize(("m", "n"), [(1, 1), (60, 63), (7, 577)])
@pytest.mark.parametrize("more", ["", ", zero_point=false", ", symmetric=false", ", group=16", ", group='tensor'"])
def test_the_product_is_that_of_rounded_inputs_and_weights(m: int, n: int, more: str) -> None:
    weight, x = torch.randn(m, n), inputs(31, n)
    operator = fitted(STATIC[:-1] + more + ")", weight, x)
    assert operator.input_scale is not None
    assert operator.input_zero is not None
    for given in (x, 5 * x[:1], x[:0], x[0]):  # beyond the grid inputs are cut off; one vector sees the grid of all
        scale, zero = operator.input_scale.double(), operator.input_zero.double()
        codes = (torch.round(given / operator.input_scale).double() + zero).clamp(-128, 127)
        expected = (codes - zero) * scale @ operator.to_dense().double().T
        found = operator.apply(given)
        assert found.shape == (*given.shape[:-1], m)
        assert_close(found, expected.float(), terms=n)
    if more == ", zero_point=false":
        assert int(operator.input_zero) == 0


def test_a_grid_holds_zero_and_errs_less_than_the_whole_range() -> None:
    x = inputs(400, 24)
    x[3, 5] = 60.0  # one large number would leave the others few steps
    stats = Stats.from_inputs(x, sample=400)
    scale, zero = static_grid("int8", stats)
    assert bool((quantize_inputs(torch.zeros(3), scale, zero) == zero).all())

    def error(step: torch.Tensor, offset: torch.Tensor) -> float:
        return float((((quantize_inputs(x, step, offset).float() - offset) * step) - x).square().sum())

    whole = torch.tensor([(60.0 - float(x.min())) / 255])
    offset = torch.round(-128 - x.min() / whole).to(torch.int8)
    assert error(scale, zero) <= error(whole, offset)


def test_without_a_sample_the_grid_spans_the_range() -> None:
    x = torch.tensor([[-1.0, 0.5], [3.0, 2.0]])
    scale, zero = static_grid("int8", Stats.from_inputs(x))
    assert_close(scale, torch.tensor([4 / 255]))
    assert int(zero) == round(-128 + 255 / 4)
    still, nothing = static_grid("int8", Stats.from_inputs(torch.zeros(2, 3)))
    assert torch.isfinite(1 / still).all()
    assert bool((quantize_inputs(torch.zeros(3), still, nothing) == nothing).all())


def test_ranges_follow_scales_parts_and_files() -> None:
    x = torch.tensor([[-1.0, 0.5, 7.0], [3.0, 2.0, -9.0]])
    stats = Stats.from_inputs(x)
    assert stats.ranges is not None
    assert stats.ranges.tolist() == [[-1.0, 0.5, -9.0], [3.0, 2.0, 7.0]]
    turned = scaled_stats(stats, torch.tensor([-2.0, 1.0, 1.0]))
    assert turned.ranges is not None
    assert turned.ranges.tolist() == [[-6.0, 0.5, -9.0], [2.0, 2.0, 7.0]]
    part = stats.part(slice(1, 3)).ranges
    assert part is not None
    assert part.tolist() == [[0.5, -9.0], [2.0, 7.0]]


def test_ranges_are_gathered_over_all_batches(tmp_path: object) -> None:
    program = recast.capture(nn.Linear(3, 2).eval(), (torch.randn(4, 3),))
    batches = [torch.randn(5, 3) + 1, 4 * torch.randn(2, 3)]
    found = recast.calibrate(program, batches)
    ranges = next(iter(found.groups.values())).ranges
    assert ranges is not None
    both = torch.cat(batches)
    assert torch.equal(ranges, torch.stack((both.amin(0), both.amax(0))).double())
    found.save(f"{tmp_path}/statistics")
    again = recast.Calibration.load(f"{tmp_path}/statistics")
    assert again.hash == found.hash


def test_the_prediction_counts_what_is_cut_off() -> None:
    weight, x = torch.randn(40, 60), inputs(300, 60)
    stats = Stats.from_inputs(x, sample=300)
    operator = Form.parse(STATIC).fit(weight, stats)
    measured, predicted = measured_errors(weight, operator, stats), predicted_errors(weight, operator, stats)[1]
    assert measured is not None
    assert predicted is not None
    assert 0.7 < measured / predicted < 1.4


def test_what_other_targets_run_computes_the_same() -> None:
    weight, x = torch.randn(24, 63), inputs(17, 63)
    operator = fitted(STATIC, weight, x)

    def product(codes: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (codes.double() @ values.double().T).float() * scale

    assert_close(dynamic_int8(operator, "int8", product).apply(x), operator.apply(x), terms=63)


def test_an_operator_is_restored_from_fields_and_tensors() -> None:
    x = inputs(9, 12)
    operator = fitted(STATIC, torch.randn(4, 12), x)
    again = Quantized.build(operator.fields(), operator.own_tensors(), {})
    assert torch.equal(again.apply(x), operator.apply(x))
    outline = Form.parse(STATIC).outline((4, 12), torch.float32)
    assert outline is not None
    assert outline.nbytes == operator.nbytes
    old = Form.parse("int8").fit(torch.randn(4, 12)).fields()
    assert "static" not in old


@pytest.mark.parametrize("form", [STATIC, f"{STATIC} + low_rank(2)", f'smoothquant(base="{STATIC}")'])
def test_without_calibration_it_is_refused(form: str) -> None:
    assert Form.parse(form).needs_data
    program = recast.capture(nn.Linear(12, 8).eval(), (torch.randn(4, 12),))
    with pytest.raises(CalibrationError, match=r"range of the inputs is needed.*recast\.calibrate"):
        recast.plan(program, form)
    x = inputs(20, 12)
    statistics = recast.calibrate(program, [x])
    after = recast.rewrite(program, recast.plan(program, form, statistics), calibration=statistics, pictures=False)
    with torch.no_grad():
        gap, size = (after(x) - program(x)).norm(), program(x).norm()
    assert gap < 0.05 * size


def test_parameters_that_do_not_go_together_are_refused() -> None:
    assert str(Form.parse(STATIC)) == "int8(activations=true, per_token=false, static=true)"
    assert Form.parse(str(Form.parse(STATIC))) == Form.parse(STATIC)
    with pytest.raises(FormError, match="add activations=true"):
        Form.parse("int8(static=true)")
    with pytest.raises(FormError, match="add static=true"):
        Form.parse("int8(activations=true, zero_point=false)")
