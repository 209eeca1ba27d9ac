"""Mixtures whose experts are joined between their linears, chosen by a table, or made of two linears with attention between."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.sites import MoESite
from tests.helpers import assert_close

H, W, E, K = 16, 24, 4, 2  # features, hidden width, experts, experts a token visits


class Stack(nn.Module):
    """A linear for each expert, on runs of rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, outputs, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        runs = x.split(sizes, dim=0)
        return torch.cat([F.linear(runs[e], self.weight[e]) for e in range(E)], dim=0)


class Runs(nn.Module):
    """Rows sorted by expert go through stacks; what lies between is computed on all of them at once."""

    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.gate = nn.Linear(H, E, bias=False)
        self.first, self.last = Stack(H, 2 * W if gated else W), Stack(W, H)

    def between(self, h: Tensor, order: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(h)
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, H)
        weights, chosen = self.gate(tokens).topk(K, dim=1)
        weights = weights.softmax(1)
        sizes = torch.zeros(tokens.shape[0], E).scatter(1, chosen, 1).long().sum(0).tolist()
        _, order = chosen.flatten().sort(0)
        rows = order.div(K, rounding_mode="trunc")
        h = self.between(self.first(tokens[rows], sizes), order)
        y = self.last(h, sizes) * weights.flatten()[order][:, None]
        return torch.zeros_like(tokens).index_add(0, rows, y).view(x.shape)


class Heads(Runs):
    """Mixture of attention heads: an expert makes queries and takes what attention gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Stack(H, W), Stack(W, H)
        self.kv = nn.Linear(H, 2 * W)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return super().forward(x)

    def between(self, h: Tensor, order: Tensor) -> Tensor:
        batch, length, _ = self.x.shape
        q = torch.zeros_like(h).index_add(0, order, h).view(batch, length, K, W).transpose(1, 2)
        k, v = (t.unsqueeze(1).repeat(1, K, 1, 1) for t in self.kv(self.x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, W)[order]


class Table(nn.Module):
    """A token's number decides which experts it visits; the router weights what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, H)
        self.gate = nn.Linear(H, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * W, H) / math.sqrt(H))
        self.down_proj = nn.Parameter(torch.randn(E, H, W) / math.sqrt(W))
        self.register_buffer("table", torch.stack([torch.randperm(E)[:K] for _ in range(12)]))

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embedding(ids).view(-1, H)
        chosen = self.table[ids.reshape(-1)].long()  # type: ignore[index]
        weights = F.softplus(self.gate(tokens)).sqrt().gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5
        numbers, each = chosen.reshape(-1), tokens.repeat_interleave(K, 0)
        gate, up = torch.bmm(self.gate_up_proj[numbers], each.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down_proj[numbers], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(-1, K, H).sum(1)


def made(model: nn.Module, *inputs: Tensor) -> tuple[Program, list[MoESite], list[Any]]:
    program = recast.capture(model.double().eval(), inputs)
    found = recognise(program)
    return program, [s for s in found.sites if isinstance(s, MoESite)], [m for m in found.misses if m.kind == "moe"]


@pytest.mark.parametrize(("gated", "roles"), [(True, ["gate_up", "down"]), (False, ["up", "down"])])
def test_experts_joined_between_their_linears(gated: bool, roles: list[str]) -> None:
    torch.manual_seed(0)
    model = Runs(gated)
    program, (site,), misses = made(model, torch.randn(2, 5, H, dtype=torch.float64))
    assert not misses
    assert [list(expert) for expert in site.experts] == [roles] * E
    assert [expert["down"].name for expert in site.experts] == [f"last.{e}" for e in range(E)]
    assert [expert[roles[0]].name for expert in site.experts] == [f"first.{e}" for e in range(E)]
    assert site.top_k == K
    assert site.activation == ("silu" if gated else "gelu")
    x = torch.randn(3, 4, H, dtype=torch.float64)
    with torch.no_grad():
        assert_close(program(x), model(x), terms=W * H)


def test_other_rows_are_not_the_experts_own() -> None:
    class Turned(Runs):
        def between(self, h: Tensor, order: Tensor) -> Tensor:
            return F.gelu(h).flip(0)  # the runs of the second stack are other rows

    model = Turned(gated=False)
    _, sites, _ = made(model, torch.randn(2, 5, H, dtype=torch.float64))
    assert not [s for s in sites if "down" in s.experts[0]]


def test_a_mixture_of_attention_heads() -> None:
    torch.manual_seed(0)
    _, (site,), misses = made(Heads(), torch.randn(2, 5, H, dtype=torch.float64))
    assert not misses
    assert [(e["in"].name, e["out"].name) for e in site.experts] == [(f"first.{e}", f"last.{e}") for e in range(E)]
    assert "between the two linears" in site.notes[0]


def test_experts_chosen_by_a_table() -> None:
    torch.manual_seed(0)
    _, (site,), _ = made(Table(), torch.randint(0, 12, (2, 5)))
    assert site.router is not None
    assert (site.router.name, site.pattern, site.top_k, site.renormalised) == ("gate", "moe_by_table", K, True)
    assert [e["down"].name for e in site.experts] == [f"down_proj.{e}" for e in range(E)]
    assert math.isclose(site.scale, 1.5)


def test_a_gather_elsewhere_is_no_choice() -> None:
    class Other(Table):
        def forward(self, ids: Tensor) -> Tensor:
            tokens = self.embedding(ids).view(-1, H)
            chosen = self.table[ids.reshape(-1)].long()  # type: ignore[index]
            return self.gate(tokens).gather(1, chosen)  # scores at places, and no experts

    _, sites, misses = made(Other(), torch.randint(0, 12, (2, 5)))
    assert not sites
    assert not misses


def test_a_router_of_several_linears() -> None:
    class Deep(Runs):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(H, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, E))  # type: ignore[assignment]

    torch.manual_seed(0)
    _, (site,), misses = made(Deep(), torch.randn(2, 5, H, dtype=torch.float64))
    assert not misses
    assert site.router is not None
    assert site.router.name == "gate.4"
    assert [e["down"].name for e in site.experts] == [f"last.{e}" for e in range(E)]
