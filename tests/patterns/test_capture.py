"""Capture: whatever the model takes and gives, the program takes and gives; what cannot be captured says why."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.patterns.errors import CaptureError, PlanError
from recast.patterns.program import Program
from tests.helpers import assert_close


@dataclasses.dataclass
class Answer:
    value: Tensor
    extra: Tensor | None = None


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


torch.export.register_dataclass(Answer)


class Nested(nn.Module):
    """Several inputs of every structure, a default, flags, and outputs in a dictionary with all kinds inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(
        self, x: Tensor, pair: tuple[Tensor, Tensor], *, table: Mapping[str, Tensor], bias: Tensor | None = None, twice: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        y = self.a(x) + self.b(pair[0] - pair[1]) + table["p"] - table["q"]
        y = y if bias is None else y + bias
        return {
            "answer": Answer(y * (2 if twice else 1)),
            "pair": Pair(y, x),
            "list": [y.sum(-1), (x,)],
            "none": None,
            "number": 3,
        }


def nested(batch: int = 2, length: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)
    x, left, right = (torch.randn(batch, length, 8, generator=generator) for _ in range(3))
    p, q = (torch.randn(batch, length, 6, generator=generator) for _ in range(2))
    return (x, (left, right)), {"table": {"p": p, "q": q}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Nested().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    args, kwargs = nested()
    return recast.capture(model, args, kwargs)


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Answer):
        same(found.value, expected.value)
        assert found.extra is None
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        for f, e in zip(found, expected, strict=True):
            same(f, e)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("batch", "length"), [(2, 4), (1, 1), (3, 17), (5, 3)])
def test_nested_inputs_and_outputs_at_any_size(program: Program, model: nn.Module, batch: int, length: int) -> None:
    args, kwargs = nested(batch, length)
    same(program(*args, **kwargs), model(*args, **kwargs))


def test_arguments_by_position_by_name_in_any_order(program: Program, model: nn.Module) -> None:
    (x, pair), kwargs = nested()
    p, q = kwargs["table"]["p"], kwargs["table"]["q"]
    expected = model(x, pair, **kwargs)
    same(program(x, pair=pair, **kwargs), expected)
    same(program(pair=pair, table=kwargs["table"], x=x), expected)
    same(program(x, pair, table={"q": q, "p": p}), expected)
    same(program(x, pair, **kwargs, bias=None), expected)


def wrong(batch: int = 2, **change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (x, pair), kwargs = nested(batch)
    kwargs = {"x": x, "pair": pair, **kwargs, **change}
    return (), {k: v for k, v in kwargs.items() if v is not ...}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wrong(x=torch.zeros(2, 4, 8, dtype=torch.float64)), r"input 'x' was captured as float32\[.*8\], a float64\[2, 4, 8\]"),
        (wrong(x=torch.zeros(2, 4, 7)), r"input 'x' was captured as .*, a float32\[2, 4, 7\] was given; capture with"),
        (wrong(x=torch.zeros(2, 8)), r"input 'x' was captured as"),
        (wrong(x=torch.zeros(3, 4, 8)), r"inputs 'x' and 'pair\[0\]' share the size"),
        (wrong(x=3), "input 'x' must be a tensor like float32"),
        (wrong(x=None), "input 'x' must be a tensor"),
        (wrong(x=...), r"not given: \['x'\]"),
        (wrong(y=torch.zeros(1)), r"given besides: \['y'\]"),
        (wrong(bias=torch.zeros(6)), r"given besides: \['bias'\]"),
        (wrong(pair=[torch.zeros(2, 4, 8)] * 2), "captured with inputs of structure"),
        (wrong(pair=(torch.zeros(2, 4, 8),)), "captured with inputs of structure"),
        (wrong(table={"p": torch.zeros(2, 4, 6)}), "captured with inputs of structure"),
        (wrong(table={"p": torch.zeros(2, 4, 6), "r": torch.zeros(2, 4, 6)}), "captured with inputs of structure"),
        ((nested()[0] + (1, 2, 3), nested()[1]), "takes 2 positional arguments"),
        (((nested()[0][0], nested()[0][1]), {**nested()[1], "x": nested()[0][0]}), "several values for argument 'x'"),
    ],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong(program: Program, call: tuple[Any, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        program(*call[0], **call[1])


def test_flags_are_constants_that_are_checked(model: nn.Module) -> None:
    args, kwargs = nested()
    program = recast.capture(model, args, {**kwargs, "bias": None, "twice": True})
    same(program(*args, **kwargs, bias=None, twice=True), model(*args, **kwargs, twice=True))
    for change, message in (
        ({"twice": False}, "was the constant True at capture and is False now"),
        ({"twice": 1}, "was the constant True at capture and is 1 now"),
        ({"bias": torch.zeros(6)}, "was the constant None at capture and is a tensor now"),
    ):
        with pytest.raises(TypeError, match=message):
            program(*args, **{**kwargs, "bias": None, "twice": True, **change})


def test_captured_twice_gives_the_same_text(program: Program, model: nn.Module) -> None:
    args, kwargs = nested(3, 5)
    assert str(recast.capture(model, args, kwargs)) == str(program)


def test_golden_text() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 6), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(6), nn.Linear(6, 4, bias=False)
    ).eval()
    assert str(recast.capture(model, (torch.randn(2, 3, 8),))) == (
        "program Sequential(input_1: f32[s0, s1, 8])\n"
        "  linear: f32[s0, s1, 6] = linear(input_1, 0.weight: f32[6, 8], 0.bias: f32[6])\n"
        "  gelu: f32[s0, s1, 6] = gelu(linear)\n"
        "  layer_norm: f32[s0, s1, 6] = layer_norm(gelu, [6], 3.weight: f32[6], 3.bias: f32[6], 1e-05, False)\n"
        "  linear_1: f32[s0, s1, 4] = linear(layer_norm, 4.weight: f32[4, 6])\n"
        "  return linear_1\n"
    )


# Weights.


class Weights(nn.Module):
    """Tied, shared under two names, packed in one storage, not contiguous, in three dtypes, and buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.again = self.first
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.narrow = nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
        self.fp16 = nn.Parameter(torch.randn(8, 8, dtype=torch.float16))
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("hidden", torch.randn(8), persistent=False)
        self.constant = torch.full((8,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.tied(self.first(x))) @ self.turned + self.shift + self.hidden * self.constant
        return F.linear(x, self.narrow.float()) + (x.half() @ self.fp16).float() * torch.tensor([1.0, 2.0] * 4)


def test_weights_of_all_kinds() -> None:
    torch.manual_seed(0)
    model = Weights().eval()
    x = torch.randn(3, 8)
    program = recast.capture(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    assert program.aliases == {"tied.weight": "first.weight", "again.weight": "first.weight"}
    assert set(program.weights) >= {"first.weight", "turned", "narrow", "fp16", "shift", "hidden", "constant"}
    assert "tied.weight" not in program.weights
    assert program.weights["turned"].data_ptr() == model.turned.data_ptr(), "shared with the model, not copied"
    assert program.weights["turned"].stride() == (1, 8)
    sites = {s.name: s for s in recast.find(program)}
    assert len(sites["first"].uses) == 3  # type: ignore[attr-defined]
    assert {"turned", "narrow", "fp16"} <= set(sites)
    model.first.weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(6, 4))

    def forward(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        y = self.linear(x)
        self.cache.index_copy_(0, (self.calls - 1)[None], y.sum(0)[None])
        scratch.mul_(2)
        return y @ self.cache.t(), self.calls.clone()


def test_what_the_model_writes_is_written() -> None:
    torch.manual_seed(0)
    model, other = Counter().eval(), Counter().eval()
    other.load_state_dict(model.state_dict())
    program = recast.capture(model, (torch.randn(3, 4), torch.ones(2)))
    assert int(model.calls) == 0, "capturing runs nothing"
    assert "calls <-" in str(program)
    for _ in range(3):
        x, scratch = torch.randn(3, 4), torch.ones(2)
        given = scratch.clone()
        with torch.no_grad():
            expected, found = other(x, scratch), program(x, given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(given, scratch)
    torch.testing.assert_close(program.weights["cache"], other.cache)
    before = program.weights["calls"].clone()
    rewritten = recast.rewrite(program, recast.plan(program, {"default": "int8", "allow_larger": True}))
    assert torch.equal(program.weights["calls"], before), "planning and verifying leave the state alone"
    rewritten(torch.randn(3, 4), torch.ones(2))
    assert torch.equal(program.weights["calls"], before + 1)


# Sizes.


def test_a_batch_of_one_stays_free() -> None:
    model = nn.Linear(8, 4).eval()
    program = recast.capture(model, (torch.randn(1, 8),))
    assert [program(torch.randn(n, 8)).shape[0] for n in (1, 2, 9)] == [1, 2, 9]


def test_a_sequence_as_long_as_there_are_heads() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 32))

    torch.manual_seed(0)
    model = Heads().eval()
    program = recast.capture(model, (torch.randn(4, 4, 32),))
    for batch, length in ((4, 4), (1, 1), (2, 3), (3, 17)):
        x = torch.randn(batch, length, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


def test_fixed_sizes_are_noted_and_checked() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 15) if x.shape[0] == 5 else x

    program = recast.capture(Fixed().eval(), (torch.randn(5, 6),))
    assert any("keeps size 5 in dimension 0" in note for note in program.notes)
    assert program(torch.randn(5, 6)).shape == (2, 15)
    with pytest.raises(TypeError, match="capture with dynamic_shapes"):
        program(torch.randn(4, 6))


def test_dynamic_shapes_can_be_given() -> None:
    batch = torch.export.Dim("batch")
    program = recast.capture(nn.Linear(8, 4).eval(), (torch.randn(3, 5, 8),), dynamic_shapes=({0: batch},))
    assert program(torch.randn(7, 5, 8)).shape == (7, 5, 4)
    with pytest.raises(TypeError, match="was captured as"):
        program(torch.randn(7, 6, 8))


# What cannot be captured, and what may not be rewritten.


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_captured_says_what_and_where() -> None:
    with pytest.raises(CaptureError) as caught:
        recast.capture(DataDependent().eval(), (torch.randn(3),))
    text = str(caught.value)
    assert text.startswith("capture: DataDependent cannot be traced as one graph: ")
    assert re.search(r"test_capture\.py.*, line \d+, in forward", text), "names the line of the model"
    assert "x.sum() > 0" in text, "and the operation"
    assert 'torch.compile(model, backend="recast")' in text, "and what to try"


@pytest.mark.parametrize("thing", [lambda x: x, 3, nn.Linear])
def test_only_modules(thing: Any) -> None:
    with pytest.raises(CaptureError, match=r"a torch\.nn\.Module is needed, .* was given; wrap the function"):
        recast.capture(thing, (torch.randn(3),))


def test_wrong_example_inputs_are_a_capture_error() -> None:
    with pytest.raises(CaptureError, match=r"Linear does not run on the example inputs: RuntimeError: .*shapes"):
        recast.capture(nn.Linear(8, 4).eval(), (torch.randn(3, 7),))
    with pytest.raises(CaptureError, match=r"does not run on the example inputs: TypeError: .*missing 1 required"):
        recast.capture(nn.Linear(8, 4).eval(), ())


def test_training_mode_is_captured_and_refused_for_rewriting() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).eval()
    model[1].train()
    program = recast.capture(model, (torch.randn(3, 64),))
    assert program.training
    with pytest.raises(PlanError, match=r"captured in training mode.*; call model\.eval\(\) before"):
        recast.rewrite(program, recast.plan(program, "int8"))


def test_models_of_transformers_without_their_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32, (1, 5))
    program = recast.capture(model, (ids,))
    assert model.config.use_cache is True, "restored"
    assert any("use_cache" in note for note in program.notes)
    given = torch.randint(0, 32, (3, 9))
    with torch.no_grad():
        found, expected = program(input_ids=given), model(given)
    assert type(found) is CausalLMOutputWithPast
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECAST_CACHE", "off")


def test_inputs_by_any_name_have_free_sizes_too() -> None:
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
            y: Tensor = self.a(x) + inputs["y"]
            return y

    model = Any_().eval()
    program = recast.capture(model, (torch.randn(3, 8),), {"y": torch.randn(3, 8)})
    assert "forward" not in model.__dict__
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    assert_close(program(x, y=y), model(x, y=y), terms=8)
