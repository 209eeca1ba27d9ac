"""Mixtures of experts: every way to write routing and dispatch is read, each expert's matrices are named, rewritten exactly."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.plan import Entry, Plan
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.sites import MoESite
from tests.helpers import assert_close

H, W, E, K = 16, 24, 5, 2  # features, hidden width, experts, experts a token visits
SHAPES = ((2, 5), (1, 1), (3, 7))  # batch, length; the captured length is the number of experts

Route = Callable[[Tensor, nn.Module], tuple[Tensor, Tensor]]


# Routing: scores of all experts to weights and numbers of the chosen ones.


def softmax_first(scores: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    weights, chosen = scores.softmax(-1).topk(K, -1)
    return weights, chosen


def renormalised(scores: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    weights, chosen = scores.softmax(-1, dtype=torch.float64).topk(K, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), chosen


def softmax_last(scores: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(scores, K, dim=-1)
    return weights.softmax(-1), chosen


def sigmoid(scores: Tensor, block: nn.Module) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(scores, K, dim=-1)
    return weights.sigmoid(), chosen


def corrected(scores: Tensor, block: Any) -> tuple[Tensor, Tensor]:
    scores = scores.sigmoid()
    chosen = torch.topk(scores + block.correction, K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, chosen


def grouped_choice(scores: Tensor, block: Any) -> tuple[Tensor, Tensor]:
    scores = torch.cat([scores, scores[:, :1]], 1).sigmoid()  # six scores in three groups
    best = (scores + 1).view(-1, 3, 2).topk(2, dim=-1)[0].sum(-1)
    groups = best.topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, groups, 1)
    allowed = scores.masked_fill(~mask.unsqueeze(-1).expand(-1, 3, 2).reshape(-1, 6).bool(), 0.0)
    weights, chosen = allowed[:, :E].topk(K, dim=-1)
    return weights, chosen


def one_best(scores: Tensor, block: Any) -> tuple[Tensor, Tensor]:
    scores = scores.softmax(-1)
    chosen = scores.argmax(-1, keepdim=True)
    return scores.gather(1, chosen), chosen


ROUTES: dict[str, tuple[Route, dict[str, Any]]] = {
    "softmax first": (softmax_first, {"scoring": "softmax", "renormalised": False}),
    "renormalised": (renormalised, {"scoring": "softmax", "renormalised": True}),
    "softmax last": (softmax_last, {"scoring": "softmax", "renormalised": True}),
    "sigmoid": (sigmoid, {"scoring": "sigmoid", "renormalised": False}),
    "corrected": (corrected, {"scoring": "sigmoid", "renormalised": True, "corrected": True, "scale": 2.5}),
    "grouped": (grouped_choice, {"scoring": "sigmoid", "groups": 3}),
    "one best": (one_best, {"scoring": "softmax", "top_k": 1}),
}


class Experts(nn.Module):
    """All experts' matrices in two parameters; `turned` ones are stored (in, out)."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        first, last = ((E, H, 2 * W), (E, W, H)) if turned else ((E, 2 * W, H), (E, H, W))
        self.gate_up_proj = nn.Parameter(torch.randn(first) / math.sqrt(H))
        self.down_proj = nn.Parameter(torch.randn(last) / math.sqrt(W))
        self.gate_up_bias = nn.Parameter(torch.randn(E, 2 * W))
        self.down_bias = nn.Parameter(torch.randn(E, H))


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def woven(y: Tensor) -> Tensor:
    gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# Dispatch: what tokens, weights (tokens, k), numbers (tokens, k) and experts give.


def looked_up(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any, *, act: Any = gated) -> Tensor:
    numbers = chosen.reshape(-1)
    each = x.repeat_interleave(chosen.shape[1], 0)
    h = act(torch.bmm(experts.gate_up_proj[numbers], each.unsqueeze(-1)).squeeze(-1))
    y = torch.bmm(experts.down_proj[numbers], h.unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], chosen.shape[1], -1).sum(1)


def looked_up_by_rows(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    numbers = chosen.reshape(-1)
    rows = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, chosen.shape[1]).reshape(-1)
    h = gated(torch.bmm(experts.gate_up_proj[numbers], x[rows].unsqueeze(-1)).squeeze(-1))
    y = torch.bmm(experts.down_proj[numbers], h.unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], chosen.shape[1], -1).sum(1)


def looked_up_turned(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    numbers = chosen.reshape(-1)
    each = x.repeat_interleave(chosen.shape[1], 0)
    h = torch.bmm(each.unsqueeze(1), experts.gate_up_proj.index_select(0, numbers)).squeeze(1)
    h = woven(h + experts.gate_up_bias[numbers])
    y: Tensor = torch.bmm(h.unsqueeze(1), experts.down_proj[numbers]).squeeze(1) + experts.down_bias[numbers]
    return (y * weights.reshape(-1, 1)).view(x.shape[0], chosen.shape[1], -1).sum(1)


def looked_up_einsum(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    h = gated(torch.einsum("ti,taoi->tao", x, experts.gate_up_proj[chosen]))
    return torch.einsum("taoi,tai->tao", experts.down_proj[chosen], h).mul(weights[..., None]).sum(1)


def sorted_rows(chosen: Tensor) -> tuple[Tensor, Tensor]:
    numbers, order = torch.sort(chosen.reshape(-1))
    count = torch.histc(numbers.float(), bins=E, min=0, max=E - 1)
    return order, torch.cumsum(count, 0, dtype=torch.int32)


def in_runs(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
        k = chosen.shape[1]
        order, ends = sorted_rows(chosen)
        h = gated(product(x[order // k], experts.gate_up_proj.transpose(-2, -1), ends))
        y = product(h, experts.down_proj.transpose(-2, -1), ends) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0))
        return y[back].view(x.shape[0], k, -1).sum(1)

    return run


def define_fallback() -> None:
    """The operation is defined where this is imported: not while a model is traced, when classes do not register."""
    import transformers.integrations.moe  # noqa: F401


def fallback(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)
    return result


def all_by_bmm(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, chosen, weights)
    each = (x.repeat(E, 1) * dense.t().reshape(-1, 1)).view(E, -1, H)
    h = torch.bmm(each, experts.gate_up_proj.transpose(1, 2))
    gate, up = h.chunk(2, -1)
    return torch.bmm(up * F.silu(gate), experts.down_proj.transpose(1, 2)).sum(0)


def all_by_einsum(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, chosen, weights)
    h = gated(torch.einsum("ti,eoi->teo", x, experts.gate_up_proj))
    return torch.einsum("teo,te->to", torch.einsum("tei,eoi->teo", h, experts.down_proj), dense)


def all_by_matmul(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, chosen, weights)
    h = gated(x @ experts.gate_up_proj.mT)  # (experts, tokens, features)
    return (h @ experts.down_proj.mT * dense.t().unsqueeze(-1)).sum(0)


def taken_one_by_one(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(E):
        mine = ((chosen == e) * weights).sum(-1, keepdim=True)
        y = y + F.linear(gated(F.linear(x, experts.gate_up_proj[e])), experts.down_proj[e]) * mine
    return y


def one_hot(x: Tensor, weights: Tensor, chosen: Tensor, experts: Any) -> Tensor:
    seat = F.one_hot(chosen, E).to(x.dtype)  # a place for every token at every expert
    sent = torch.einsum("tke,th->eth", seat, x)
    h = gated(torch.einsum("eth,efh->etf", sent, experts.gate_up_proj))
    y = torch.einsum("etf,ehf->eth", h, experts.down_proj)
    return torch.einsum("eth,te->th", y, (seat * weights[..., None]).sum(1))


@dataclasses.dataclass(frozen=True)
class Way:
    run: Callable[..., Tensor]
    dispatch: str
    activation: str = "silu"
    turned: bool = False
    double: bool = True  # whether the operation exists in float64
    routed: bool = True  # whether the matrix a row meets is computed


WAYS = {
    "looked up": Way(looked_up, "bmm"),
    "looked up, rows by number": Way(looked_up_by_rows, "bmm"),
    "looked up, turned, woven, biases": Way(looked_up_turned, "bmm", "quick_gelu, clamped", turned=True),
    "looked up, einsum": Way(looked_up_einsum, "bmm"),
    "in runs": Way(in_runs(lambda x, w, e: F.grouped_mm(x, w, offs=e)), "grouped_mm", double=False),
    "in runs, custom operation": Way(in_runs(fallback), "grouped_mm"),
    "all, bmm": Way(all_by_bmm, "bmm", routed=False),
    "all, einsum": Way(all_by_einsum, "einsum", routed=False),
    "all, matmul": Way(all_by_matmul, "bmm", routed=False),
    "one by one": Way(taken_one_by_one, "loop", routed=False),
    "one hot": Way(one_hot, "one_hot", routed=False),
}


class Block(nn.Module):
    def __init__(self, way: Way, route: Route = renormalised) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(H)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = Experts(way.turned)
        self.correction = nn.Parameter(torch.randn(E))
        self.before, self.after = nn.Linear(H, H), nn.Linear(H, H)
        self.way, self.route = way.run, route

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        tokens = self.norm(x).type_as(x).view(-1, H)
        weights, chosen = self.route(self.gate(tokens), self)
        weights = weights.type_as(x)
        y: Tensor = self.after(x + self.way(tokens, weights.to(x.dtype), chosen, self.experts).view_as(x))
        return y


class Model(nn.Module):
    def __init__(self, way: Way, route: Route = renormalised) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(way, route)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


def made(way: Way, route: Route = renormalised) -> tuple[nn.Module, Program]:
    define_fallback()
    model = Model(way, route).eval()
    dtype = torch.float64 if way.double else torch.bfloat16
    model = model.to(dtype)
    return model, recast.capture(model, (torch.randn(2, 5, H, dtype=dtype),))


def mixture(program: Program) -> MoESite:
    found = recognise(program)
    (site,) = (s for s in found.sites if isinstance(s, MoESite))
    assert not [m for m in found.misses if m.kind in ("moe", "mlp")]
    return site


@pytest.fixture(scope="module", params=WAYS)
def case(request: pytest.FixtureRequest) -> tuple[Way, nn.Module, Program]:
    way = WAYS[request.param]
    return (way, *made(way))


def test_every_matrix_is_a_site_of_its_expert(case: tuple[Way, nn.Module, Program]) -> None:
    way, _, program = case
    sites = {s.name: s for s in find_linear(program)[0]}
    for e in range(E):
        first, last = sites[f"layers.0.experts.{e}.gate_up_proj"], sites[f"layers.0.experts.{e}.down_proj"]
        assert (first.shape, last.shape) == ((2 * W, H), (H, W))
        assert [p.name for p in first.parts] == ["gate", "up"]
        rows = [range(W), range(W, 2 * W)]
        if "woven" in way.run.__code__.co_names:
            rows = [range(0, 2 * W, 2), range(1, 2 * W, 2)]
        assert [[r for a, b in p.rows for r in range(a, b)] for p in first.parts] == [list(r) for r in rows]
        assert not first.tied
        assert not last.tied
        assert (first.uses[0].routing is not None) == way.routed
    assert len(sites) == 2 * E + 3
    covered = recast.coverage(program)
    assert covered.fraction == 1.0
    assert sum(s.flops for s in sites.values()) == covered.flops_matched


def test_the_mixture(case: tuple[Way, nn.Module, Program]) -> None:
    way, _, program = case
    site = mixture(program)
    assert site.name == "layers.0"
    assert site.router is not None
    assert site.router.name == "layers.0.gate"
    assert (site.dispatch, site.activation, site.top_k, site.scoring) == (way.dispatch, way.activation, K, "softmax")
    assert site.renormalised
    assert [site.shared, site.corrected, site.groups, site.notes] == [(), False, 0, ()]
    assert len(site.experts) == E
    for e, roles in enumerate(site.experts):
        name = f"layers.0.experts.{e}"
        assert {role: piece.name for role, piece in roles.items()} == {
            "gate": f"{name}.gate_up_proj.gate",
            "up": f"{name}.gate_up_proj.up",
            "down": f"{name}.down_proj",
        }
    assert site.x is not None
    assert site.to_dict()["experts"][0]["down"] == "layers.0.experts.0.down_proj"


@pytest.mark.parametrize("chosen", ["all", "some"])
def test_rewriting_is_exact(case: tuple[Way, nn.Module, Program], chosen: str) -> None:
    """With the dense form at all experts, or at some: the rows of the others keep their own."""
    _, model, program = case
    names = [s.name for s in find_linear(program)[0] if "experts" in s.name]
    names = names if chosen == "all" else [n for n in names if ".1." in n or ".4." in n]
    plan = Plan("", {n: Entry(n, recast.Form.parse("dense")) for n in names})
    result = recast.rewrite(program, plan, cache=OperatorCache(None), pictures=False)
    assert len(list(result.graph.find_nodes(op="call_module"))) == len(names)
    assert any("experts" in n and "bias" not in n for n in result.weights) == (chosen == "some")
    dtype = next(model.parameters()).dtype
    for batch, length in SHAPES:
        x = torch.randn(batch, length, H, dtype=dtype)
        with torch.no_grad():
            assert_close(result(x), model(x), terms=W * H)


def test_a_lossy_form_changes_its_own_expert_only(case: tuple[Way, nn.Module, Program]) -> None:
    _, model, program = case
    plan = recast.plan(
        program,
        {"rules": [{"match": "*.experts.2.*_proj", "form": "low_rank(rank=2)"}], "allow_larger": True},
        cache=OperatorCache(None),
    )
    assert set(plan.entries) == {f"layers.0.experts.2.{n}" for n in ("gate_up_proj", "down_proj")}
    result = recast.rewrite(program, plan, cache=OperatorCache(None), pictures=False)
    copy: Any = Model(Way(model.layers[0].way, ""), model.layers[0].route)  # type: ignore[union-attr, index]
    copy = copy.to(next(model.parameters()).dtype)
    if copy.layers[0].experts.gate_up_proj.shape != program.weights["layers.0.experts.gate_up_proj"].shape:
        copy.layers[0].experts = Experts(turned=True).to(next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    turned = copy.layers[0].experts.turned
    for node in result.graph.find_nodes(op="call_module"):
        module: Any = result.module.get_submodule(str(node.target))
        dense = module.operator.to_dense()
        weight = getattr(copy.layers[0].experts, module.site.rsplit(".", 1)[1])
        weight.data[2] = dense.t() if turned else dense
    x = torch.randn(3, 4, H, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        assert_close(result(x), copy(x), terms=W * H)


def test_calibration_sees_the_rows_of_each_expert(case: tuple[Way, nn.Module, Program]) -> None:
    way, model, program = case
    if not way.routed:
        return  # those run every expert on all rows
    x = torch.randn(3, 7, H, dtype=next(model.parameters()).dtype)
    block: Any = model.layers[0]  # type: ignore[index]
    with torch.no_grad():
        tokens = block.norm(x + block.before(x)).view(-1, H)
        _, chosen = block.route(block.gate(tokens), block)
    stats = recast.calibrate(program, [x])
    for e in range(E):
        mine = tokens[(chosen == e).any(1)].double()
        found = stats[f"layers.0.experts.{e}.gate_up_proj"]
        assert found.tokens == len(mine) == stats[f"layers.0.experts.{e}.down_proj"].tokens
        assert found.gram is not None
        assert_close(found.gram, mine.T @ mine, terms=len(mine))


@pytest.mark.parametrize("name", ROUTES)
def test_routing(name: str) -> None:
    route, wanted = ROUTES[name]
    site = mixture(made(WAYS["looked up"], route)[1])
    assert {field: getattr(site, field) for field in wanted} == wanted
    assert site.top_k == wanted.get("top_k", K)
    assert (site.corrected, site.groups) == (wanted.get("corrected", False), wanted.get("groups", 0))


class Latent(Block):
    """Experts work on a norm of what a linear makes of the tokens; the router sees the tokens themselves."""

    def __init__(self, way: Way) -> None:
        super().__init__(way)
        self.shrink, self.grow = nn.Linear(H, H, bias=False), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, H)
        weights, chosen = self.route(self.gate(tokens), self)
        latent = self.shrink(tokens)
        latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-5)
        y: Tensor = self.grow(self.way(latent, weights, chosen, self.experts)).view_as(x)
        return y


@pytest.mark.parametrize("name", ["looked up", "one by one"])
def test_experts_of_fewer_features_than_the_router_sees(name: str) -> None:
    program = recast.capture(Latent(WAYS[name]).double().eval(), (torch.randn(2, 5, H, dtype=torch.float64),))
    site = mixture(program)
    assert site.router is not None
    assert site.router.name == "gate"
    assert [roles["down"].name for roles in site.experts] == [f"experts.{e}.down_proj" for e in range(E)]
