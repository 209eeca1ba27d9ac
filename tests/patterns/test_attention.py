"""Attention in every spelling is found with its linears, and what is none is told of with the reason."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.dialect import has_dialect
from recast.passes.rules.raise_structures import raise_program
from recast.patterns.attention.dialect import attention
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite
from tests.helpers import assert_close

H, D = 4, 6
Core = Callable[..., Tensor]


class Block(nn.Module):
    """Projections around a core that is given as a function of (batch, heads, tokens, features)."""

    def __init__(self, core: Core, heads: int = H, kv_heads: int = H, packed: bool = False, width: int = 20) -> None:
        super().__init__()
        self.core, self.heads, self.kv_heads, self.packed = core, heads, kv_heads, packed
        if packed:
            self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * D)
        else:
            self.q_proj = nn.Linear(width, heads * D)
            self.k_proj = nn.Linear(width, kv_heads * D)
            self.v_proj = nn.Linear(width, kv_heads * D, bias=False)
        self.o_proj = nn.Linear(heads * D, width)
        self.register_buffer("bias", torch.randn(heads, 1, 1))

    def forward(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        mask = mask[:, None].to(x.dtype) * -2.0
        if self.packed:
            sizes = [self.heads * D, self.kv_heads * D, self.kv_heads * D]
            q, k, v = self.qkv(x).split(sizes, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q = q.unflatten(-1, (self.heads, D)).transpose(1, 2)
        k = k.unflatten(-1, (self.kv_heads, D)).transpose(1, 2)
        v = v.unflatten(-1, (self.kv_heads, D)).transpose(1, 2)
        y = self.core(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def boolean(mask: Tensor) -> Tensor:
    return mask > -1


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) / math.sqrt(D) + mask).softmax(-1) @ v


def mask_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (mask + (q @ k.mT) * 0.3).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.3).masked_fill(~boolean(mask), -1e9).softmax(-1) @ v


def where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(boolean(mask), q @ k.mT, -1e4).softmax(-1) @ v


def where_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.where(~boolean(mask), torch.full_like(scores, -1e4), scores).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = 20.0 * torch.tanh(((q * 0.4) @ k.mT) / 20.0)
    return nn.functional.dropout((scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype), 0.1, False) @ v


def written_as_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) + mask
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def batched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, h, t, d = q.shape
    flat = [a.reshape(b * h, -1, d) for a in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(b, h, t, -1) + mask
    return torch.bmm(scores.view(b * h, t, -1).softmax(-1), flat[2]).view(b, h, t, d)


def flipped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (v.mT @ ((q @ k.mT) + mask).softmax(-1).mT).mT


def sunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sinks = torch.ones(1, H, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    scores = torch.cat([(q @ k.mT) * 0.5 + mask, sinks], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    slopes = 2.0 ** -torch.arange(1, H + 1).view(-1, 1, 1)
    return ((q @ k.mT) * 0.5 + slopes * distance + mask).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


def sigmoid(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid((q @ k.mT) * 0.3 + mask) @ v


CORES = [plain, mask_first, filled, where, where_not, capped, written_as_einsum, batched, flipped, sunk, alibi, fused, causal,
         sigmoid]  # fmt: skip


def inputs(batch: int = 2, tokens: int = 5, keys: int = 0) -> tuple[Tensor, Tensor]:
    """Activations, and a boolean mask that is true where -2 is added to the scores."""
    mask = torch.zeros(batch, tokens, keys or tokens, dtype=torch.bool)
    mask[:, :-1, -1] = True
    return torch.randn(batch, tokens, 20), mask


def attentions(program: recast.Program) -> list[AttentionSite]:
    return [s for s in recognise(program).sites if isinstance(s, AttentionSite)]


@functools.cache
def captured(core: Core) -> recast.Program:
    """In float64, with free sizes; what is found there is not changed by any test."""
    x, mask = inputs()
    return recast.capture(Block(core).double().eval(), (x.double(), mask))


def pieces(site: AttentionSite) -> list[str | None]:
    return [p.name if p is not None else None for p in (site.q, site.k, site.v, site.o)]


@pytest.mark.parametrize("core", CORES, ids=lambda c: c.__name__)
def test_every_spelling_is_found_with_its_linears(core: Core) -> None:
    found = recognise(captured(core))
    (site,) = [s for s in found.sites if isinstance(s, AttentionSite)]
    assert pieces(site) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (H, H, D, D)
    assert not [m for m in found.misses if m.kind == "attention"]
    assert not site.cross
    assert not site.cache


@pytest.mark.parametrize("core", CORES, ids=lambda c: c.__name__)
def test_what_a_site_stands_for_computes_the_same(core: Core) -> None:
    """The dialect's operation on the values that enter the core gives what the core gives, also with tokens == heads."""
    from recast.patterns.attention.dialect import emit

    program = captured(core)
    (site,) = attentions(program)
    emitted = emit(site)
    if core in (written_as_einsum, batched, flipped):
        assert emitted is None
        assert any(note.startswith("not raised") for note in site.notes)
        return
    assert emitted is not None
    function, operands, options = emitted
    seen: dict[Any, Tensor] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            seen[node] = super().run_node(node)
            return seen[node]

    for batch, tokens in ((1, 3), (3, H), (2, 7)):
        x, mask = inputs(batch, tokens)
        Record(program.module).run(x.double(), mask)
        values = torch.fx.node.map_arg(operands, lambda node: seen[node])
        assert_close(function(*values, **options), seen[site.node], terms=D)


def test_grouped_queries_in_every_way_of_repeating() -> None:
    def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return plain(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)

    def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (a[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for a in (k, v))
        return fused(q, k, v, mask)

    def enabled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    for core in (repeated, expanded, enabled):
        for packed in (False, True):
            (site,) = attentions(recast.capture(Block(core, kv_heads=2, packed=packed).eval(), inputs()))
            assert (site.heads, site.kv_heads) == (H, 2), core
            names = ["qkv.q", "qkv.k", "qkv.v"] if packed else ["q_proj", "k_proj", "v_proj"]
            assert pieces(site) == [*names, "o_proj"]


def test_cross_attention_takes_keys_from_elsewhere() -> None:
    x, mask = inputs(keys=9)
    context = torch.randn(2, 9, 20)
    (site,) = attentions(recast.capture(Block(plain).eval(), (x, mask, context)))
    assert site.cross
    assert pieces(site) == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("core", "kind"),
    [(fused, "additive"), (causal, "causal"), (filled, "boolean"), (plain, "additive")],
    ids=["fused", "causal", "filled", "plain"],
)
def test_kind_of_mask(core: Core, kind: str) -> None:
    (site,) = attentions(captured(core))
    assert site.mask in (kind, "causal" if kind == "boolean" else kind)


def test_steps_are_read() -> None:
    (site,) = attentions(captured(capped))
    assert site.softcap == pytest.approx(20.0)
    assert site.scale == pytest.approx(1.0)
    assert site.normaliser == "softmax"
    (site,) = attentions(captured(sunk))
    assert site.sinks is not None
    assert site.scale == pytest.approx(0.5)


def test_softmax_over_the_wrong_dimension_is_a_miss_with_its_reason() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT) + mask).softmax(-2) @ v

    found = recognise(recast.capture(Block(wrong).eval(), inputs()))
    assert not [s for s in found.sites if s.kind == "attention"]
    (missed,) = [m for m in found.misses if m.kind == "attention"]
    assert "attention_written_out" in missed.reason
    assert missed.where.startswith("tests/patterns/test_attention.py") or "test_attention.py" in missed.where


def test_dialect_bounds_and_masks_in_order() -> None:
    q, k, v = torch.randn(2, H, 3, D), torch.randn(2, H, 5, D), torch.randn(2, H, 5, D)
    keep = torch.rand(2, 1, 3, 5) > 0.3
    keep[..., 0] = True
    mine = attention(q, k.mT, v, (keep,), kinds=("keep",), fills=(-1e30,), softcap=3.0)
    scores = 3 * torch.tanh((q @ k.mT) / math.sqrt(D) / 3)
    assert_close(mine, scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v, terms=D)


def test_a_padding_mask_made_of_comparisons_is_not_causal() -> None:
    class Padded(Block):
        def forward(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
            positions = torch.arange(x.shape[1])
            keep = mask[:, :1, :] & (positions >= 0)
            return super().forward(x, (~keep).expand(-1, x.shape[1], -1))

    class Causal(Block):
        def forward(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
            positions = torch.arange(x.shape[1])
            return super().forward(x, (positions[None, :] > positions[:, None]) & mask)

    for model, kind in ((Padded(plain), "additive"), (Causal(plain), "causal")):
        (site,) = attentions(recast.capture(model.eval(), inputs()))
        assert site.mask == kind


def test_a_bias_that_is_subtracted_or_scaled_is_not_dropped() -> None:
    """Only the largest score of a row may be taken off for nothing."""

    def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT) - 3 * mask).softmax(-1) @ v

    def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.add(q @ k.mT, mask, alpha=3).softmax(-1) @ v

    for core in (subtracted, scaled):
        (site,) = attentions(recast.capture(Block(core).eval(), inputs()))
        assert any(note.startswith("not raised") for note in site.notes), core


def first_row_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT + mask
    return (scores - scores[:, :, :1]).softmax(-1) @ v


def largest_of_column_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT + mask
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def another_value_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores + mask - scores.flip(-1)).softmax(-1) @ v


@pytest.mark.parametrize("core", [first_row_off, largest_of_column_off, another_value_off], ids=lambda c: c.__name__)
def test_what_is_taken_off_besides_the_largest_of_a_row_stays(core: Core) -> None:
    model = Block(core).double().eval()
    x, mask = inputs()
    program = recast.capture(model, (x.double(), mask))
    raised = raise_program(program, ("attention",))
    assert not has_dialect(raised)
    for site in attentions(program):
        assert any(note.startswith("not raised") for note in site.notes)
    for batch, tokens in ((1, 3), (3, H)):
        x, mask = inputs(batch, tokens)
        assert_close(raised(x.double(), mask), model(x.double(), mask), terms=20)


@pytest.mark.parametrize("place", ["scores", "weights", "operation"])
def test_dropout_that_is_active_stays(place: str) -> None:
    """A model may drop at random in eval mode too; the operation that draws is still there after raising."""

    def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if place == "operation":
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.4)
        scores = q @ k.mT + mask
        if place == "scores":
            return nn.functional.dropout(scores, 0.4, training=True).softmax(-1) @ v
        return nn.functional.dropout(scores.softmax(-1), 0.4, training=True) @ v

    program = recast.capture(Block(dropping).eval(), inputs())
    raised = raise_program(program, ("attention",))
    assert not has_dialect(raised)
    assert str(raised) == str(program)
    for site in attentions(program):
        assert any(note.startswith("not raised") for note in site.notes)
    given = inputs()
    assert not torch.equal(raised(*given), raised(*given))  # drawn anew at every call
