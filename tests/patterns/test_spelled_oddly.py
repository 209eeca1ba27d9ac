"""Spellings that were once miscounted, or that later passes could not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.passes.rules.raise_structures import raise_program
from recast.patterns.sites import AttentionSite, MoESite
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


class Root(nn.Module):
    def __init__(self, mean_square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.g, self.proj, self.mean_square = nn.Parameter(torch.randn(16)), nn.Linear(16, 16), mean_square

    def forward(self, x: Tensor) -> Any:
        return self.proj(x * torch.rsqrt(self.mean_square(x) + 1e-6).unsqueeze(-1) * self.g)


MEAN_SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum, letters": lambda x: torch.einsum("btd,btd->bt", x, x) / 16,
    "einsum, ellipsis": lambda x: torch.einsum("...d, ...d -> ...", x, x) / 16,
    "einsum, share": lambda x: torch.einsum("...d,...d->...", x, x) * (1 / 16),
    "einsum of casts": lambda x: torch.einsum("btd,btd->bt", x.float(), x.float()).div(16),
    "vecdot": lambda x: torch.linalg.vecdot(x, x) / 16,
}


@pytest.mark.parametrize("name", MEAN_SQUARES)
def test_a_norm_whose_squares_are_summed_by_a_product(name: str) -> None:
    model, x = Root(MEAN_SQUARES[name]).eval(), torch.randn(2, 16, 16)
    program = recast.capture(model, (x,))
    (site,) = recast.find(program, "norm")
    assert (site.flavour, site.features, site.weights) == ("rms", 16, ("g",))  # type: ignore[attr-defined]
    other = torch.randn(3, 5, 16)
    assert_close(raise_program(program, ("norm",))(other), model(other), terms=16)


NO_MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "another count": lambda x: torch.einsum("btd,btd->bt", x, x) / 15,
    "over tokens": lambda x: torch.einsum("btd,btd->bd", x, x) / 16,
    "products of rows": lambda x: (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1).squeeze(-1) / 16,
    "vectors across": lambda x: torch.linalg.vecdot(x, x, dim=1) / 16,
}


@pytest.mark.parametrize("name", NO_MEANS)
def test_a_norm_missed_behind_a_product_is_told(name: str) -> None:
    program = recast.capture(Root(NO_MEANS[name]).eval(), (torch.randn(2, 16, 16),))
    assert not recast.find(program, "norm")
    assert "norm" in {miss.kind for miss in recast.coverage(program).misses}


class AllVisited(nn.Module):
    def __init__(self, way: str, scores: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)) -> None:
        super().__init__()
        self.router, self.way, self.scores = nn.Linear(16, 3), way, scores
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 24) / 4), nn.Parameter(torch.randn(3, 24, 16) / 4)

    def forward(self, x: Tensor) -> Any:
        p = self.scores(self.router(x))
        if self.way == "loop":
            return sum(expert(x) * p[..., i : i + 1] for i, expert in enumerate(self.experts))
        if self.way == "stack":
            return (torch.stack([expert(x) for expert in self.experts], -2) * p.unsqueeze(-1)).sum(-2)
        if self.way == "odd":  # not an expert as known here
            return sum(
                expert[2](expert[0](x).sort(-1).values) * p[..., i : i + 1] for i, expert in enumerate(self.experts)
            )
        if self.way == "linear":
            return sum(expert[0](x) * p[..., i : i + 1] for i, expert in enumerate(self.experts))
        h = F.silu(torch.einsum(f"btd,edf->{self.way}", x, self.up))
        y = torch.einsum(f"{self.way},efd->bted", h, self.down)
        return torch.einsum("bted,bte->btd", y, p)


@pytest.mark.parametrize("scores", [lambda s: s.softmax(-1), torch.sigmoid], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("way", ["loop", "stack", "btef", "betf", "ebtf"])
def test_a_mixture_in_which_every_token_visits_every_expert(way: str, scores: Callable[[Tensor], Tensor]) -> None:
    model, x = AllVisited(way, scores).eval(), torch.randn(2, 5, 16)
    program = recast.capture(model, (x,))
    (site,) = recast.find(program, "moe")
    assert isinstance(site, MoESite)
    assert (site.top_k, len(site.experts), site.router.name) == (3, 3, "router")
    assert site.scoring == ("sigmoid" if scores is torch.sigmoid else "softmax")
    assert {frozenset(roles) for roles in site.experts} == {frozenset({"up", "down"})}
    plan = recast.plan(program, {"default": "int8"})
    assert len(plan.entries) == 7  # a router, and two matrices of each expert
    rewritten, other = recast.rewrite(program, plan), torch.randn(3, 3, 16)
    with torch.no_grad():
        assert 0 < float((rewritten(other) - model(other)).norm() / model(other).norm()) < 0.03
    exact = recast.rewrite(program, recast.plan(program, {"default": "dense"}))
    assert_close(exact(other), model(other), terms=24)


@pytest.mark.parametrize(
    ("way", "why"), [("odd", "no expert is made of linears as known here"), ("linear", "one linear each")]
)
def test_experts_that_are_weighed_but_not_known_are_told(way: str, why: str) -> None:
    program = recast.capture(AllVisited(way).eval(), (torch.randn(2, 5, 16),))
    assert not recast.find(program, "moe")
    (miss,) = (miss for miss in recast.coverage(program).misses if miss.kind == "moe")
    assert why in miss.reason


def test_features_weighed_by_scores_are_no_mixture() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.value(x) * self.gate(x).softmax(-1))

    program = recast.capture(Gated().eval(), (torch.randn(2, 5, 16),))
    assert not recast.find(program, "moe")
    assert "moe" not in {miss.kind for miss in recast.coverage(program).misses}


def test_projections_to_heads_stay_one_matrix() -> None:
    model = Weights(lambda x, w, _: torch.einsum("btd,hdk->bthk", x, w.view(4, 16, 4)).flatten(2).sin()).eval()
    (site,) = recast.find(recast.capture(model, (torch.randn(2, 3, 16),)), "linear")
    assert site.shape == (16, 16)  # type: ignore[attr-defined]
