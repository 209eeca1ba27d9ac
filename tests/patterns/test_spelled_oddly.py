"""Spellings that were once miscounted, or that later passes could not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.patterns.sites import AttentionSite
from tests.helpers import assert_close


class Weights(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w, self.w1, self.run = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w, self.w1)


ONE: dict[str, Callable[..., Tensor]] = {
    "rows by literal numbers": lambda x, w, _: x @ w[torch.arange(15, -1, -1)],
    "columns by a list": lambda x, w, _: F.linear(x, w[:, [0, 2, 1, *range(3, 16)]]),
    "expanded over the batch": lambda x, w, _: torch.bmm(x, w.expand(x.shape[0], 16, 16)),
    "expanded, on the left": lambda x, w, _: torch.bmm(w.expand(x.shape[0], 16, 16), x.mT),
    "repeated over the batch": lambda x, w, _: torch.bmm(x, w.repeat(x.shape[0], 1, 1)),
    "added to": lambda x, w, _: torch.baddbmm(x, x, w.unsqueeze(0).expand(x.shape[0], -1, -1)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_weight_is_counted_once_and_rewritten(name: str) -> None:
    model, x = Weights(ONE[name]).eval(), torch.randn(2, 3, 16)
    program = recast.capture(model, (x,))
    coverage = recast.coverage(program).to_dict()
    assert coverage["parameters"] == {"total": 256, "matched": 256}, coverage["misses"]
    assert not coverage["misses"]
    rewritten = recast.rewrite(program, recast.plan(program, "int8"))
    other = torch.randn(5, 3, 16)
    with torch.no_grad():
        assert 0 < float((rewritten(other) - model(other)).norm() / model(other).norm()) < 0.02  # eight bits
        assert_close(program(other), model(other), terms=16)


def test_a_weight_that_is_tiled_is_not_taken_for_one_repeated_over_a_batch() -> None:
    model = Weights(lambda x, w, _: torch.bmm(x, w[:4, :4].repeat(x.shape[0], 4, 4))).eval()
    x = torch.randn(2, 3, 16)
    assert_close(recast.capture(model, (x,))(x), model(x), terms=16)


CHAINS: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda x, w, w1: (x @ w) @ w1,
    "einsum": lambda x, w, w1: torch.einsum("btd,de->bte", torch.einsum("btd,de->bte", x, w), w1),
    "both": lambda x, w, w1: torch.einsum("btd,de->bte", x @ w, w1),
    "halves": lambda x, w, w1: torch.cat(((x @ w) @ w1[:, :8], (x @ w) @ w1[:, 8:]), -1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_products_that_follow_each_other_are_rewritten(name: str) -> None:
    model, x = Weights(CHAINS[name]).eval(), torch.randn(2, 3, 16)
    program = recast.capture(model, (x,))
    rewritten = recast.rewrite(program, recast.plan(program, {"default": "int8"}))
    assert len(rewritten.report.to_dict()["sites"]) >= 2
    with torch.no_grad():
        assert float((rewritten(x) - model(x)).norm() / model(x).norm()) < 0.03


def test_a_captured_attention_runs_with_gradients() -> None:
    """Its kernel, and with it the strides of what it gives, is another one where a mask has gradients."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, use_cache=False, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.randint(0, 64, (2, 7)), "decoder_input_ids": torch.randint(0, 64, (2, 5))}
    program = recast.capture(model, (), inputs)
    with torch.enable_grad():
        found, wanted = program(**inputs).logits, model(**inputs).logits
    assert found.requires_grad
    assert_close(found, wanted, terms=48)


@pytest.mark.parametrize(("heads", "nope", "rope"), [(4, 8, 8), (2, 16, 8), (8, 16, 16)])
def test_heads_of_latent_attention(heads: int, nope: int, rope: int) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=rope, v_head_dim=8, qk_nope_head_dim=nope,
        first_k_dense_replace=1, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    program = recast.capture(DeepseekV3ForCausalLM(config).eval(), (torch.randint(0, 64, (2, 7)),))
    (site,) = (site for site in recast.find(program) if isinstance(site, AttentionSite))
    assert (site.heads, site.kv_heads, site.head_dim) == (heads, heads, nope + rope)
    assert site.q is not None
    assert site.q.name.endswith("q_b_proj")  # both of its parts
    assert "joined from" in site.notes[0]
    assert "kv_a_proj_with_mqa" in site.notes[0]


def test_passes_that_undo_each_other_run_once() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = torch.einsum("bhqd,bhkd->bhqk", q * 8**-0.25, k * 8**-0.25)
            mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
            return self.o(mixed.transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 32, dtype=torch.float64)
    program = recast.capture(Attention().double().eval(), (x,))
    smaller = recast.simplify(program, "fold_scale,merge_linears,split_packed")
    assert all(len(name) < 40 for name in smaller.weights)
    assert_close(smaller(x), program(x), terms=32)
