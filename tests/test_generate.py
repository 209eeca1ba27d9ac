"""Generation under the backend: prefill and one-token decoding with a static cache, as `generate` runs them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from recast import backend

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def mixture() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def generated(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, cache_implementation="static"
        )
    return made


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RECAST_CACHE", "off")
    torch._dynamo.reset()
    backend.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [llama, mixture])
def test_dense_generates_token_for_token_what_eager_does(make: Any) -> None:
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = generated(make(), ids)
    model = make()
    model.compile(backend="recast", options={"recipe": "dense"})
    assert torch.equal(generated(model, ids), expected)


@pytest.mark.parametrize("make", [llama, mixture])
def test_int8_generates_and_fits_each_matrix_once(make: Any) -> None:
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    model = make()
    model.compile(backend="recast", options={"recipe": "int8"})
    assert generated(model, ids).shape == (2, 11)
    reports = backend.reports()
    rewritten = {row.name for report in reports for row in report.rows}
    assert rewritten
    assert sum(bool(report.rows) for report in reports) > 1, "prefill and decoding are graphs of their own"
    assert backend._cache().fits == len(rewritten), "each matrix is fitted once, however many graphs use it"
    assert torch.equal(generated(model, ids), generated(model, ids))
    assert len(backend.reports()) == len(reports), "graphs were compiled again for the same shapes"
