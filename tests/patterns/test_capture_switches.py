"""What capture switches in a model that cannot be traced as it is, that it says so, and that it switches everything back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.patterns.capture import switches
from recast.patterns.capture.checked import check_result
from recast.patterns.capture.export import capture
from recast.patterns.errors import CaptureError
from tests import zoo
from tests.helpers import assert_close


def _program(name: str, implementation: str) -> tuple[Any, Any, Any, Any]:
    model, args, kwargs = zoo.build(name)
    model.set_experts_implementation(implementation)
    return model, args, kwargs, capture(model, args, kwargs)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_in_a_loop(name: str) -> None:
    model, args, kwargs, program = _program(name, "eager")
    assert model.config._experts_implementation == "eager"
    assert any("experts as 'grouped_mm'" in note and "'eager'" in note for note in program.notes)
    for batch, length in [(1, 4), (3, 13)]:
        args, kwargs = zoo.vary(model, batch, length)
        with torch.no_grad():
            assert_close(program(*args, **kwargs).logits, model(*args, **kwargs).logits, terms=10_000)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_that_can_be_traced_are_left_alone(implementation: str) -> None:
    model, _, _, program = _program("qwen3_moe", implementation)
    assert model.config._experts_implementation == implementation
    assert not any("experts" in note for note in program.notes)


def test_switched_back_after_an_error() -> None:
    model, _, _ = zoo.build("qwen3_moe")
    model.set_experts_implementation("eager")
    model.config.use_cache = True
    attention = model.config._attn_implementation
    with pytest.raises(CaptureError):
        capture(model, (), {"input_ids": torch.zeros(2, 3)})  # an embedding of floats
    assert model.config._experts_implementation == "eager"
    assert model.config.use_cache is True
    assert model.config._attn_implementation == attention


class _Config:
    use_cache = True


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = _Config()


def test_a_setting_of_the_class_is_not_left_behind_on_the_instance() -> None:
    model = _Holder()
    with switches.cache(model) as said:
        assert said
        assert model.config.use_cache is False
    assert model.config.use_cache is True
    assert "use_cache" not in vars(model.config)


class _HitExperts(nn.Module):
    """The loop over experts as models write it, one row of the mask more than there are experts."""

    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        mask = nn.functional.one_hot(chosen, 4).T
        result = torch.zeros_like(x)
        for row in torch.greater(mask.sum(-1), 0).nonzero():
            for number, expert in enumerate(self.experts):
                tokens = torch.where(mask[row[0]] * (row[0] == number))[0]
                result = result.index_add(0, tokens, expert(x[tokens]))
        return result


def test_a_loop_over_experts_that_were_hit() -> None:
    model = _HitExperts().eval()
    program = capture(model, (torch.randn(12, 8),))
    assert any("every expert visited" in note for note in program.notes)
    for count in (1, 3, 20):
        x = torch.randn(count, 8)
        assert_close(program(x), model(x), terms=8)


def _branching() -> nn.Module:
    """A model of transformers' own kind whose forward looks at values; other modules are left to their authors."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class Branch(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if bool(x.sum() > 0) else 2 * self.inner(-x)

    return Branch(PreTrainedConfig()).eval()


def test_a_branch_on_values_is_taken_as_in_the_example_and_others_refused() -> None:
    model = _branching()
    x = torch.ones(2, 4)
    program = capture(model, (x,))
    assert any("as the example takes them" in note for note in program.notes)
    assert_close(program(x), model(x), terms=4)
    with pytest.raises(RuntimeError, match="the program was captured for"):
        program(-x)


class _Object:
    """No tensor, and nothing that torch.export can take apart."""


class _GivesObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.inner(x), "state": _Object()}


def test_a_result_that_is_no_tensor_is_left_out() -> None:
    model = _GivesObject().eval()
    x = torch.randn(2, 4)
    program = capture(model, (x,))
    assert any("without output 'state' (_Object)" in note for note in program.notes)
    result = program(x)
    assert list(result) == ["y"]
    assert_close(result["y"], model(x)["y"], terms=4)
    assert "state" in model(x)


def test_what_nothing_helps_against_fails_with_the_first_reason() -> None:
    class Shape(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such thing")

    with pytest.raises(CaptureError, match="no such thing"):
        capture(Shape().eval(), (torch.randn(2, 4),))


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.dropout(self.up(x), 0.3, training=True)
        return y


def test_another_result_is_refused_and_a_rounded_one_told_of() -> None:
    """Random numbers are drawn from one state, and the state outside stays as it was."""
    model, x = _Noisy().eval(), torch.randn(40, 6)
    program = recast.capture(model, (x,))
    before = torch.random.get_rng_state()
    assert check_result(model, program, (x,), {}) == []
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        program.weights["up.weight"] *= 1.01
    other = _Noisy().eval()
    other.load_state_dict({"up.weight": model.up.weight / 1.01, "up.bias": model.up.bias})
    (note,) = check_result(other, program, (x,), {})
    assert "differ by" in note
    with pytest.raises(CaptureError, match="_Noisy computes something else when it is traced"):
        check_result(_Noisy().eval(), program, (x,), {})
    with pytest.raises(CaptureError, match="does not run"):
        check_result(model, recast.capture(model, (x,), dynamic_shapes={"x": None}), (x[:3],), {})


class _TwoWays(nn.Module):
    """Does for a compiler something else than when it runs, as masks of transformers have been seen to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(x.sum())
        y: Tensor = self.up(x)
        return -y if torch.compiler.is_exporting() else y


def test_a_model_that_is_traced_along_another_way_is_refused() -> None:
    model, x = _TwoWays().eval(), torch.randn(5, 6)
    with pytest.raises(
        CaptureError, match="_TwoWays computes something else when it is traced: results differ by 200%"
    ):
        capture(model, (x, []))
    taken = capture(model, (x, []), check=False)
    assert_close(taken(x, []), -model(x, []), terms=6)


def test_the_check_leaves_inputs_and_buffers_as_they_are() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))
            self.up = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.up(x)

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) + 1

    counts = Counts().eval()
    capture(counts, (torch.randn(4, 6),))
    assert float(counts.runs) == 0
    x = torch.randn(4, 6)
    kept = x.clone()
    capture(Writes().eval(), (x,))
    assert torch.equal(x, kept)
