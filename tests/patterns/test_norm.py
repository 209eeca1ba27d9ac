"""Every spelling of a normalisation is found, says what it is, and computes the same once raised; near misses say why."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast.passes.report import fidelity
from recast.passes.rules.raise_structures import raise_program
from recast.passes.verify import coarsest_dtype, exact_bound
from recast.patterns.capture.export import capture
from recast.patterns.find import coverage
from recast.patterns.norm import RULES
from recast.patterns.recognise import Recognition, recognise
from recast.patterns.sites import NormSite

HEADS, D = 4, 12
EPS = 1e-5


class Written(nn.Module):
    """A function of x, a weight and a bias, as a module; `shape` is that of the weight."""

    def __init__(self, run: Callable[..., Any], shape: tuple[int, ...] = (D,)) -> None:
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.randn(shape) + 1)
        self.bias = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Any:
        return self.run(x, self.weight, self.bias)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def olmo2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * h).to(x.dtype)


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return w * (h.to(w.dtype) if w.dtype == torch.bfloat16 else h)


def power(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.pow((x * x).mean(-1, keepdim=True) + EPS, -0.5))


def divided(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt(EPS + torch.square(x).mean(-1, keepdim=True)) * w + b


def inverted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (1.0 / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + EPS)) * x * w


def summed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / D + EPS) * w


def unsqueezed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1) + EPS).unsqueeze(-1))


def rounded_factor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype) * w


def eps_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * w


def by_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5).clamp(min=EPS) * w


def no_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w


def no_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def grouped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.view(*x.shape[:-1], 3, D // 3)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.view(*x.shape)


def gated(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * h.to(x.dtype)) * F.silu(x + 1)


def per_head(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.view(*x.shape[:-1], HEADS, D // HEADS)
    return w[: D // HEADS] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))


def operation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), w, EPS)


def bare_operation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (D,)) * w


def root_mean_square(x: Tensor) -> Tensor:
    return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def left_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS)


def left_summed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x * torch.rsqrt((x * x).sum(-1, keepdim=True) / D + EPS)


def left_power(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x * (x.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5


def left_inverted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x * (1 / root_mean_square(x)) + b


def left_by_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + EPS)


def left_unit(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x / (x.norm(dim=-1, keepdim=True) + EPS)


def weighted_factor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * (w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def weighted_divisor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (w / root_mean_square(x)) * x


def left_number(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w[0] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def bounded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=0.25)) * w


def layer_left(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + EPS) + b


def layer_at_once(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS) * w + b


def layer_at_once_biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * w + b


def layer_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + 0.25) + b


def layer_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + 0.25) * w + b


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return w * ((x - mean) / torch.sqrt(variance + EPS)) + b


def layer_wide(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt((h - mean).pow(2).mean(-1, keepdim=True) + EPS)
    return (w.to(torch.float32) * h).to(x.dtype)


def layer_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.pow(x.var(-1, unbiased=False, keepdim=True) + EPS, -0.5) * w + b


def layer_moments(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean**2 + EPS)


def layer_folded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    scale = w * torch.rsqrt(((x - mean) * (x - mean)).mean(-1, keepdim=True) + EPS)
    return x * scale + (b - mean * scale)


def layer_folded_last(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    scale = torch.reciprocal(torch.sqrt(((x - mean) * (x - mean)).mean(-1, keepdim=True) + EPS)) * w
    moved = b - mean * scale
    return x * scale + moved


def layer_operation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w, b, EPS)


def layer_one_plus(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), w + 1, b, EPS)


def layer_bare(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (D,), None, None, EPS) * w + b


def unit(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def unit_plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / x.norm(p=2, dim=-1, keepdim=True)


def unit_inside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + EPS)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a spelling's site must say; fields left out are not looked at."""

    run: Callable[..., Any]
    flavour: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


RMS, LAYER, L2 = "rms", "layer", "l2"
W = {"eps": EPS, "weights": ("weight",), "features": D, "offset": 0.0}
SPELLINGS = [
    Expected(llama, RMS, W),
    Expected(olmo2, RMS, W),
    Expected(gemma, RMS, W | {"offset": 1.0}),
    Expected(t5, RMS, W),
    Expected(power, RMS, W),
    Expected(divided, RMS, W | {"weights": ("weight", "bias")}),
    Expected(inverted, RMS, W),
    Expected(summed, RMS, W),
    Expected(unsqueezed, RMS, W),
    Expected(rounded_factor, RMS, W),
    Expected(eps_outside, RMS, W | {"eps_at": "outside"}),
    Expected(by_norm, RMS, W | {"eps_at": "floor"}),
    Expected(no_eps, RMS, W | {"eps": 0.0}),
    Expected(no_weight, RMS, W | {"weights": ()}),
    Expected(grouped, RMS, W | {"groups": 3}),
    Expected(gated, RMS, W),
    Expected(per_head, RMS, W | {"features": D // HEADS}),
    Expected(operation, RMS, W),
    Expected(bare_operation, RMS, {"weights": ("weight",)}),
    Expected(left_outside, RMS, W | {"eps_at": "outside"}),
    Expected(left_summed, RMS, W),
    Expected(left_power, RMS, W),
    Expected(left_inverted, RMS, W | {"weights": ("weight", "bias")}),
    Expected(left_by_norm, RMS, W | {"eps_at": "outside"}),
    Expected(left_unit, L2, W | {"eps_at": "outside"}),
    Expected(left_number, RMS, W),
    Expected(weighted_factor, RMS, W),
    Expected(weighted_divisor, RMS, W),
    Expected(bounded, RMS, W | {"eps": 0.5, "eps_at": "floor"}),
    Expected(layer, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_left, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_at_once, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_at_once_biased, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_deviation, LAYER, W | {"weights": ("weight", "bias"), "eps": 0.25, "eps_at": "outside"}),
    Expected(layer_outside, LAYER, W | {"weights": ("weight", "bias"), "eps": 0.25, "eps_at": "outside"}),
    Expected(layer_wide, LAYER, W),
    Expected(layer_variance, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_moments, LAYER, W | {"weights": ()}),
    Expected(layer_folded, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_folded_last, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_operation, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(layer_one_plus, LAYER, W | {"weights": ("weight", "bias"), "offset": 1.0}),
    Expected(layer_bare, LAYER, W | {"weights": ("weight", "bias")}),
    Expected(unit, L2, {"eps": 1e-12, "eps_at": "floor", "weights": ()}),
    Expected(unit_plain, L2, {"eps": 0.0}),
    Expected(unit_inside, L2, {"eps": EPS, "eps_at": "inside"}),
]


def found(model: nn.Module, *inputs: Tensor) -> tuple[Any, Recognition]:
    program = capture(model.eval(), inputs)
    return program, recognise(program, only=RULES)


def norms(recognition: Recognition) -> list[NormSite]:
    return [site for site in recognition.sites if isinstance(site, NormSite)]


def misses(recognition: Recognition) -> list[str]:
    return [miss.reason for miss in recognition.misses if miss.kind == "norm"]


# Where a spelling casts, each dtype gives another graph: casts that change nothing are not in it.
CASTING = (llama, olmo2, gemma, t5, rounded_factor, gated, layer_wide)
CASES = [
    pytest.param(expected, dtype, id=f"{expected.run.__name__}-{dtype}")
    for expected in SPELLINGS
    for dtype in (torch.float32, *((torch.bfloat16, torch.float64) if expected.run in CASTING else (torch.bfloat16,)))
]


@pytest.mark.parametrize(("expected", "dtype"), CASES)
def test_spelling(expected: Expected, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Written(expected.run).to(dtype).eval()
    program, recognition = found(model, torch.randn(2, 5, D, dtype=dtype))
    (site,) = norms(recognition)
    assert misses(recognition) == []
    assert site.flavour == expected.flavour
    for name, value in expected.facts.items():
        assert getattr(site, name) == value, name
    bound = exact_bound(coarsest_dtype(program))  # some spellings narrow float64 themselves
    raised = raise_program(program, ("norm",))
    called = [
        n.target.__name__ for n in raised.graph.nodes if n.op == "call_function" and hasattr(n.target, "__code__")
    ]
    assert called == [f"{expected.flavour}_norm"]
    for batch, length in ((1, 7), (3, HEADS), (2, 2)):
        x = torch.randn(batch, length, D, dtype=dtype)
        with torch.no_grad():
            wanted, got = model(x), raised(x)
        assert got.dtype == wanted.dtype
        assert fidelity(wanted, got)["relative_error"] <= bound


def wrong_dimension(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w


def unbiased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * w + b


def unbiased_at_once(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS) * w + b


def unbiased_deviation(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + b


def left_of_each_token(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w.expand(5, D) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def other_value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sin(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def cubed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * w


def computed_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.amax(-1, keepdim=True).exp()) * w


def wrong_count(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (D - 1) + EPS) * w


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong_dimension, "over dimension 1 of 3; a norm takes the last"),
        (unbiased, "unbiased"),
        (unbiased_at_once, "the variance 'getitem' is the unbiased one"),
        (unbiased_deviation, "the deviation 'std' is the unbiased one"),
        (left_of_each_token, f"the weight has shape (5, {D})"),
        (other_value, "'sin' (sin) and 'x' (placeholder) are two values where one is needed"),
        (cubed, "3 where 2 is needed"),
        (computed_eps, "is computed, a literal is needed"),
        (wrong_count, f"not divided by its {D} terms"),
    ],
)
def test_near_miss(run: Callable[..., Any], reason: str) -> None:
    _, recognition = found(Written(run), torch.randn(2, 5, D))
    assert norms(recognition) == []
    (told,) = misses(recognition)
    assert reason in told


def test_statistic_of_other_values() -> None:
    """With as many tokens as features a statistic in the wrong place has a shape that fits, and is still none."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1) + EPS).unsqueeze(1) * w

    model = Written(run).eval()
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    recognition = recognise(capture(model, (torch.randn(2, D, D),), dynamic_shapes=shapes), only=RULES)
    assert norms(recognition) == []
    (told,) = misses(recognition)
    assert "it meets other values than those it is of" in told


def test_weight_of_another_size() -> None:
    """A weight for each token is none of the norm's: the norm is found without it."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return no_weight(x, w, b) * w

    _, recognition = found(Written(run, (5, 1)), torch.randn(2, 5, D))
    (site,) = norms(recognition)
    assert site.weight is None
    assert site.weights == ()


def test_table_that_is_added_is_no_bias() -> None:
    """Positions added to a norm broadcast over the batch, not over tokens."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.table = nn.LayerNorm(D), nn.Parameter(torch.randn(1, 5, D))

        def forward(self, x: Tensor) -> Tensor:
            return torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * x + self.table + self.norm(x)

    _, recognition = found(Model(), torch.randn(2, 5, D))
    written, operation = norms(recognition)
    assert (written.bias, operation.name) == (None, "norm")


def test_value_used_outside() -> None:
    """What something else reads too stays where it was."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = x.pow(2).mean(-1, keepdim=True)
        normal = x * torch.rsqrt(square + EPS)
        return w * normal, normal.sin(), square

    model = Written(run)
    program, recognition = found(model, torch.randn(2, 5, D))
    assert len(norms(recognition)) == 1
    x = torch.randn(3, HEADS, D)
    for wanted, got in zip(model(x), raise_program(program, ("norm",))(x), strict=True):
        assert fidelity(wanted, got)["relative_error"] <= exact_bound(torch.float32)


def test_weight_of_each_head() -> None:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x.view(*x.shape[:-1], HEADS, D // HEADS)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return (h * w).transpose(1, 2)

    model = Written(run, (HEADS, D // HEADS))
    program, recognition = found(model, torch.randn(2, 5, D))
    (site,) = norms(recognition)
    assert (site.weights, site.features) == (("weight",), D // HEADS)
    x = torch.randn(3, HEADS, D)
    assert fidelity(model(x), raise_program(program, ("norm",))(x))["relative_error"] <= exact_bound(torch.float32)


@pytest.mark.parametrize(
    ("module", "flavour", "facts"),
    [
        (nn.GroupNorm(2, 6), "group", {"groups": 2, "features": 3}),
        (nn.BatchNorm2d(6), "batch", {"features": 6, "weights": ("weight", "bias", "running_mean", "running_var")}),
        (nn.BatchNorm2d(6, affine=False), "batch", {"weights": ("running_mean", "running_var")}),
        (nn.LayerNorm((6, 5, 5)), "layer", {"axes": 3, "features": 150}),
    ],
    ids=["group", "batch", "batch without weight", "layer over three"],
)
def test_images(module: nn.Module, flavour: str, facts: dict[str, Any]) -> None:
    if isinstance(module, nn.BatchNorm2d):
        module(torch.randn(4, 6, 5, 5))  # statistics other than 0 and 1
    model = module.eval()
    program, recognition = found(model, torch.randn(2, 6, 5, 5))
    (site,) = norms(recognition)
    assert site.flavour == flavour
    assert {name: getattr(site, name) for name in facts} == facts
    x = torch.randn(3, 6, 5, 5)
    assert fidelity(model(x), raise_program(program, ("norm",))(x))["relative_error"] <= exact_bound(torch.float32)


def test_weight_in_the_shape_of_a_matrix() -> None:
    """The weight and bias of a norm over two dimensions belong to the norm: no matrices that were missed."""
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm((5, D)))
    covered = coverage(capture(model.eval(), (torch.randn(2, 5, D),)))
    assert (covered.misses, covered.parameters_matched, covered.parameters_total) == ((), D * D, D * D)


def test_frozen_batch_norm() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(6) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias, mean, variance = (
                t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
            )
            scale = weight * (variance + EPS).rsqrt()
            return x * scale + (bias - mean * scale)

    model = Frozen().eval()
    program, recognition = found(model, torch.randn(2, 6, 5, 5))
    (site,) = norms(recognition)
    assert (site.flavour, site.eps, site.features) == ("batch", EPS, 6)
    assert site.weights == ("weight", "bias", "running_mean", "running_var")
    x = torch.randn(3, 6, 5, 5)
    assert fidelity(model(x), raise_program(program, ("norm",))(x))["relative_error"] <= exact_bound(torch.float32)


def test_names_are_of_modules_and_their_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.first(x).sin())

    _, recognition = found(Model(), torch.randn(2, 5, D))
    assert [site.name for site in norms(recognition)] == ["first", "first_1"]
