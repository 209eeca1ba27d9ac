"""Models that ask tensors for their values while they are traced: what capture answers, and what the program then checks."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recast.patterns.capture import switches
from recast.patterns.capture.decisions import decisions
from recast.patterns.capture.export import capture
from recast.patterns.capture.known import KnownValues
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")


def _of_transformers(forward: Any) -> Any:
    """A model of transformers' own kind: for those, branches on values are answered by the example."""

    class Model(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PreTrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

    Model.forward = forward
    torch.manual_seed(0)
    return Model(transformers.PreTrainedConfig()).eval()


def _refused(program: Any, *args: Any) -> None:
    with pytest.raises(RuntimeError, match="the program was captured for"):
        program(*args)


@pytest.mark.parametrize(
    ("asks", "other"),
    [
        (lambda self, x: self.inner(x) if (x > 0).any() else self.inner(-x) * 2, lambda x: -x),
        (lambda self, x: self.inner(x) if (x > 0).flatten().any().item() else self.inner(-x) * 2, lambda x: -x),
        (lambda self, x: self.inner(x) if torch.equal(x, x.abs()) else self.inner(-x) * 2, lambda x: -x),
        (lambda self, x: self.inner(x) if torch.allclose(x, x.abs()) else self.inner(-x) * 2, lambda x: -x),
        (lambda self, x: self.inner(x) if 0.0 not in x else self.inner(x + 1), lambda x: 0 * x),
    ],
    ids=["bool", "item", "equal", "allclose", "contains"],
)
def test_truths_hold_for_any_size_and_are_checked(asks: Any, other: Any) -> None:
    model = _of_transformers(asks)
    x = torch.rand(3, 5, 4) + 0.1
    program = capture(model, (x,))
    assert any("as the example takes them" in note for note in program.notes)
    for shape in ((3, 5, 4), (1, 4, 4), (5, 13, 4)):
        y = torch.rand(shape) + 0.1
        assert_close(program(y), model(y), terms=4)
        _refused(program, other(y))


def test_the_run_that_decides_leaves_nothing_behind() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen.add_(1)
        x = x + torch.rand(()) * 0
        return self.inner(x) if (x > 0).any() else x

    model = _of_transformers(forward)
    state = torch.random.get_rng_state()
    with decisions(model, (torch.ones(2, 4),), {}):
        pass
    assert model.seen.item() == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_way_for_eager_runs_where_the_one_for_compilers_fails() -> None:
    def forward(self: Any, x: Tensor, mask: Any = None) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(x.shape[:-1])
        return self.inner(x) * mask[..., None]

    model = _of_transformers(forward)
    program = capture(model, (torch.randn(3, 5, 4),))
    assert any("way for eager runs" in note for note in program.notes)
    x = torch.randn(2, 7, 4)
    assert_close(program(x), model(x), terms=4)
    assert not torch.compiler.is_compiling()
    assert "lambda" not in torch.compiler.is_compiling.__qualname__


def test_a_module_cast_to_the_type_it_has() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.inner = self.inner.to(x.dtype)
            return self.inner(x)

    model = Casts().eval()
    move = nn.Module.to
    weight = model.inner.weight
    program = capture(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert_close(program(x), model(x), terms=4)
    assert nn.Module.to is move
    assert model.inner.weight is weight


def test_a_tensor_made_of_sizes_is_taken_for_its_number() -> None:
    class Chunks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.size(0), torch.div(x.size(1), 2, rounding_mode="trunc"), 2, x.size(2)).sum(2)

    with KnownValues():
        exported = torch.export.export(Chunks(), (torch.randn(3, 8, 4),), strict=False)
    x = torch.randn(3, 8, 4)
    assert_close(exported.module()(x), Chunks()(x), terms=2)


def test_what_is_known_is_followed_until_it_is_written() -> None:
    with KnownValues() as mode:
        rows = torch.arange(6).view(3, 2)
        first = rows[1]
        assert mode.value(first).tolist() == [2, 3]
        assert f"{first[0]}" == "2"
        assert [int(row[1]) for row in rows] == [1, 3, 5]
        rows.add_(torch.randint(1, 2, (3, 2)))
        assert mode.value(rows) is None
        assert mode.value(first) is None
        assert first.tolist() == [3, 4]
        drawn = torch.randint(5, (2,))
        assert mode.value(drawn) is None


class _NamedExperts(nn.Module):
    """Experts found by a name made of a tensor's value, and empty selections passed over."""

    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(8, 8) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.one_hot(self.router(x).argmax(-1), 3).T
        result = torch.zeros_like(x)
        for row in torch.greater(mask.sum(-1), 0).nonzero():
            tokens = torch.where(mask[row[0]])[0]
            if tokens.numel() == 0:
                continue
            result = result.index_add(0, tokens, self.experts[f"expert_{row[0]}"](x[tokens]))
        return result


def test_experts_by_name_with_empty_selections() -> None:
    model = _NamedExperts().eval()
    program = capture(model, (torch.randn(12, 8),))
    for count in (1, 3, 20):  # with one token, two experts have none
        x = torch.randn(count, 8)
        assert_close(program(x), model(x), terms=8)


def test_sizes_stay_as_they_are_after_a_try_with_free_ones() -> None:
    x = torch.randn(3, 5, 4)
    capture(nn.Linear(4, 4).eval(), (x,))
    assert not [name for name in vars(x) if "dynamo" in name]  # torch.export marks what it is given


def _forgotten(cls: type) -> None:
    from transformers.utils import generic

    pytree._deregister_pytree_node(cls)
    generic._registered_model_output_types.discard(cls)


def test_results_that_are_not_registered_yet() -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 31, (2, 5))
    before = torch.compiler.is_compiling
    _forgotten(CausalLMOutputWithPast)
    program = capture(model, (), {"input_ids": ids})
    assert_close(program(input_ids=ids).logits, model(ids).logits, terms=100)
    assert torch.compiler.is_compiling is before


def test_result_classes_that_are_imported_while_something_compiles() -> None:
    code = """
import torch
torch.compiler._is_compiling_flag = True
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast as Result
from transformers import LlamaConfig, LlamaForCausalLM
torch.compiler._is_compiling_flag = False
from torch.utils import _pytree
known = Result in _pytree.SUPPORTED_NODES
from recast.patterns.capture.switches import known_outputs
config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
torch.compiler._is_compiling_flag = True
known_outputs(model)
print(known, Result in _pytree.SUPPORTED_NODES)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"


def test_switches_tell_and_undo() -> None:
    asked = torch.compiler.is_compiling, torch.compiler.is_exporting, nn.Module.to
    for switch in (switches.as_eager, switches.unmoved):
        with pytest.raises(ValueError, match="stop"), switch(nn.Linear(2, 2)):
            raise ValueError("stop")
    assert (torch.compiler.is_compiling, torch.compiler.is_exporting, nn.Module.to) == asked
