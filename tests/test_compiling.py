"""`recast.compile`: experts that cannot be traced are switched for the time of a call, and breaks are told."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import recast
from recast import backend
from recast.patterns.errors import RecastError
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


def qwen3_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RECAST_CACHE", "off")
    torch._dynamo.reset()
    backend.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    backend.reset()


def rewritten() -> set[str]:
    return {row.name for report in backend.reports() for row in report.rows}


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_experts_in_a_loop_become_one_graph_and_are_a_loop_again(make: Any) -> None:
    model, plain = make(), make()
    for one in (model, plain):
        one.set_experts_implementation("eager")
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = plain(ids).logits
    recast.compile(model, "dense", fullgraph=True)
    assert_close(model(ids).logits, expected, terms=10_000)
    assert model.config._experts_implementation == "eager"
    assert len(backend.reports()) == 1
    assert not any("break" in note for note in backend.reports()[0].notes)


def test_every_expert_is_rewritten() -> None:
    model = qwen3_moe()
    model.set_experts_implementation("eager")
    recast.compile(model, "int8")
    model(torch.randint(1, 97, (2, 7)))
    for expert in range(4):
        assert any(f"experts.{expert}." in name for name in rewritten()), rewritten()


def test_a_backend_alone_says_where_the_graph_breaks_and_what_to_do() -> None:
    model = qwen3_moe()
    model.set_experts_implementation("eager")
    torch.compile(model, backend="recast", options={"recipe": "dense"})(torch.randint(1, 97, (2, 7)))
    notes = [note for report in backend.reports() for note in report.notes]
    told = [note for note in notes if "ends at a break" in note and "modeling_qwen3_moe.py" in note]
    assert told, notes
    assert any("recast.compile" in note for note in told), told


def test_the_loop_is_back_after_an_error() -> None:
    model = mixtral()
    model.set_experts_implementation("eager")
    recast.compile(model, "dense")
    with pytest.raises(Exception, match=r"[Ee]mbedding|indices|Long"):
        model(torch.zeros(2, 3))
    assert model.config._experts_implementation == "eager"


def test_what_was_asked_wrongly_is_told_at_once() -> None:
    with pytest.raises(RecastError, match="did you mean 'min_coverage'"):
        recast.compile(nn.Linear(4, 4), "int8", min_coverag=0.5)
    with pytest.raises(RecastError, match=r"a torch\.nn\.Module is needed"):
        recast.compile(torch.sin, "int8")  # type: ignore[arg-type]
