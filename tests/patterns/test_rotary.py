"""Every spelling of a rotary embedding is found, says what it is, and computes the same once raised; near misses say why."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recast.passes.report import fidelity
from recast.passes.rules.raise_structures import raise_program
from recast.passes.verify import exact_bound
from recast.patterns.capture.export import capture
from recast.patterns.recognise import Recognition, recognise
from recast.patterns.rotary import RULES
from recast.patterns.sites import RotarySite

HEADS, D = 4, 8
Run = Callable[[Tensor, Tensor, Tensor], Any]


class Positions(nn.Module):
    """Splits heads, computes cos and sin of every position (one value a pair), and calls a function of the three.

    Shapes: x (batch, heads, tokens, D), cos and sin (1, 1, tokens, D / 2).
    """

    def __init__(self, run: Run, features: int = D, attention_scaling: float = 1.0) -> None:
        super().__init__()
        self.run, self.scaling = run, attention_scaling
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(features // 2) / (features // 2)))

    def forward(self, x: Tensor) -> Any:
        h = x.view(*x.shape[:-1], HEADS, D).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None].float() * self.frequencies.float()
        cos, sin = (f()[None, None].to(x.dtype) * self.scaling for f in (angles.cos, angles.sin))
        return self.run(h, cos, sin)


def twice(t: Tensor) -> Tensor:
    return torch.cat((t, t), -1)


def each_twice(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=-1)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_colons(x: Tensor) -> Tensor:
    a, b = x[:, :, :, ::2], x[:, :, :, 1::2]
    return torch.stack((-b, a), dim=-1).flatten(-2)


def rotate_unbound(x: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((-b, a), dim=-1).reshape(x.shape)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * twice(cos)) + (rotate_half(x) * twice(sin))


def commuted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return twice(sin) * rotate_half(x) + twice(cos) * x


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * each_twice(cos) + rotate_pairs(x) * each_twice(sin)


def colons(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * each_twice(cos) + rotate_colons(x) * each_twice(sin)


def unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * each_twice(cos) + rotate_unbound(x) * each_twice(sin)


def wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    h, c, s = x.float(), twice(cos).float(), twice(sin).float()
    return (h * c + rotate_half(h) * s).to(x.dtype)


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def unwoven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return x * twice(cos) + torch.cat((b, -a), -1) * twice(sin)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((half(turned, cos[..., : D // 4], sin[..., : D // 4]), rest), dim=-1)


def partial_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same slice taken twice."""
    cos, sin = twice(cos[..., : D // 4]), twice(sin[..., : D // 4])
    return torch.cat((x[..., : D // 2] * cos + rotate_half(x[..., : D // 2]) * sin, x[..., D // 2 :]), dim=-1)


def partial_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rest, turned = torch.split(x, [2, D - 2], dim=-1)
    return torch.cat((rest, interleaved(turned, cos[..., 1:], sin[..., 1:])), dim=-1)


def sections(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def mixed(t: Tensor) -> Tensor:
        stacked = torch.stack((t, t * 0.5, t * 0.25))
        parts = stacked.split([1, 1, 2], dim=-1)
        return twice(torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1))

    return x * mixed(cos) + rotate_half(x) * mixed(sin)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide_enough = torch.promote_types(x.dtype, torch.float32)
    turn = torch.complex(cos.to(wide_enough), sin.to(wide_enough))
    h = torch.view_as_complex(x.to(wide_enough).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(h * turn).flatten(3).type_as(x)


def complex_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rest, turned = torch.split(x, [2, D - 2], dim=-1)
    return torch.cat((rest, complex_numbers(turned, cos[..., 1:], sin[..., 1:])), dim=-1)


@dataclasses.dataclass(frozen=True)
class Expected:
    run: Run
    layout: str = "half"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


SPELLINGS = [
    Expected(half),
    Expected(commuted),
    Expected(interleaved, "interleaved"),
    Expected(colons, "interleaved"),
    Expected(unbound, "interleaved"),
    Expected(wide),
    Expected(chunked),
    Expected(by_pairs, "interleaved"),
    Expected(unwoven, "unwoven"),
    Expected(other_way, facts={"inverse": True}),
    Expected(partial, facts={"rotated": D // 2, "start": 0}),
    Expected(partial_in_place, facts={"rotated": D // 2, "start": 0}),
    Expected(partial_last, "interleaved", {"rotated": D - 2, "start": 2}),
    Expected(sections),
    Expected(complex_numbers, "interleaved"),
    Expected(complex_last, "interleaved", {"rotated": D - 2, "start": 2}),
]


def found(model: nn.Module, *inputs: Tensor) -> tuple[Any, Recognition]:
    program = capture(model.eval(), inputs)
    return program, recognise(program, only=RULES)


def sites(recognition: Recognition) -> list[RotarySite]:
    return [site for site in recognition.sites if isinstance(site, RotarySite)]


# Where a spelling casts, each dtype gives another graph: casts that change nothing are not in it.
CASTING = (wide, complex_numbers, complex_last)
CASES = [
    pytest.param(expected, dtype, id=f"{expected.run.__name__}-{dtype}")
    for expected in SPELLINGS
    for dtype in (torch.bfloat16, *((torch.float32, torch.float64) if expected.run in CASTING else (torch.float64,)))
]


@pytest.mark.parametrize(("expected", "dtype"), CASES)
def test_spelling(expected: Expected, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Positions(expected.run, attention_scaling=1.25).eval()
    program, recognition = found(model, torch.randn(2, 5, HEADS * D, dtype=dtype))
    (site,) = sites(recognition)
    assert [m for m in recognition.misses if m.kind == "rotary"] == []
    assert site.layout == expected.layout
    for name, value in ({"rotated": D, "start": 0, "inverse": False} | expected.facts).items():
        assert getattr(site, name) == value, name
    assert site.x is not None
    assert site.x.meta["val"].shape[-1] == D
    own = torch.float32 if expected.run is wide and dtype == torch.float64 else dtype  # it narrows float64 itself
    assert site.x.meta["val"].dtype == own
    raised = raise_program(program, ("rotary",))
    assert sum("rotary" in n.name for n in raised.graph.nodes) == 1
    for batch, length in ((1, 7), (3, HEADS), (2, D)):
        x = torch.randn(batch, length, HEADS * D, dtype=dtype)
        with torch.no_grad():
            wanted, got = model(x), raised(x)
        assert got.dtype == wanted.dtype
        assert fidelity(wanted, got)["relative_error"] <= exact_bound(own)


def other_value(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.sin() * twice(cos) + rotate_half(x) * twice(sin)


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return x * twice(cos) + torch.cat((-a, b), -1) * twice(sin)


def woven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return x * twice(cos) + torch.cat((-b, a), -1) * twice(sin)


def written_into(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, cos, sin = x[..., : D // 2 : 2], x[..., 1 : D // 2 : 2], cos[..., : D // 4], sin[..., : D // 4]
    result = x.clone()
    result[..., : D // 2 : 2] = a * cos - b * sin
    result[..., 1 : D // 2 : 2] = b * cos + a * sin
    return result


def three_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, cos, sin = x[..., : D // 4], x[..., D // 4 : D // 2], cos[..., : D // 4], sin[..., : D // 4]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., D // 2 :]), -1)


def parts_of_the_whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = twice(cos[..., : D // 4]), twice(sin[..., : D // 4])
    turned = torch.cat((-x[..., D // 4 : D // 2], x[..., : D // 4]), -1)
    return torch.cat((x[..., : D // 2] * cos + turned * sin, x[..., D // 2 :]), -1)


def one_alone(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (a * cos - b * sin).exp()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (written_into, "is written into another value by 'copy'"),
        (three_parts, "is joined with 2 others in 'cat'"),
        (parts_of_the_whole, "not the two halves of a value"),
        (one_alone, "is read by 'exp', which does not join it"),
        (other_value, "are two values where one is needed"),
        (swapped, "does not show the second features"),
        (woven, "taken as interleaved pairs and joined as half ones"),
    ],
)
def test_near_miss(run: Run, reason: str) -> None:
    _, recognition = found(Positions(run), torch.randn(2, 5, HEADS * D))
    assert sites(recognition) == []
    (told,) = [miss.reason for miss in recognition.misses if miss.kind == "rotary"]
    assert reason in told


def test_rows_that_change_places() -> None:
    """As many tokens as heads: what is joined is arranged anew, and has a shape that fits all the same."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape[0], x.shape[2], x.shape[1], D)
        return x * each_twice(cos) + turned * each_twice(sin)

    _, recognition = found(Positions(run), torch.randn(2, HEADS, HEADS * D))
    for site in sites(recognition):  # with a fixed number of tokens nothing changes places after all
        assert site.node is not None
        assert all(isinstance(size, int) for size in site.node.meta["val"].shape[1:])


def test_rest_of_something_else() -> None:
    """What is joined behind the result and was never part of x does not belong to the embedding."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((half(x, cos, sin), x.sin()), dim=-1)

    _, recognition = found(Positions(run), torch.randn(2, 5, HEADS * D))
    (site,) = sites(recognition)
    assert site.node is not None
    assert site.node.target is torch.ops.aten.add.Tensor


def test_queries_and_keys() -> None:
    """Two sites share cos and sin, and have names of their own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Positions(lambda x, cos, sin: half(x, cos, sin) @ half(x.flip(1), cos, sin).mT)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x)

    model = Model()
    program, recognition = found(model, torch.randn(2, 5, HEADS * D))
    first, second = sites(recognition)
    assert (first.name, second.name) == ("attention.rotary", "attention.rotary_1")
    assert (first.cos, first.sin) != (None, None)
    x = torch.randn(3, HEADS, HEADS * D)
    assert fidelity(model(x), raise_program(program, ("rotary",))(x))["relative_error"] <= exact_bound(torch.float32)


def test_value_used_outside() -> None:
    def run(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = rotate_half(x)
        return x * twice(cos) + turned * twice(sin), turned

    model = Positions(run)
    program, recognition = found(model, torch.randn(2, 5, HEADS * D))
    assert len(sites(recognition)) == 1
    x = torch.randn(1, HEADS, HEADS * D)
    for wanted, got in zip(model(x), raise_program(program, ("rotary",))(x), strict=True):
        assert fidelity(wanted, got)["relative_error"] <= exact_bound(torch.float32)
