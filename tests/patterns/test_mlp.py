"""Feed-forward blocks and embeddings: the spellings that are found, and what is none."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.patterns.recognise import Recognition, recognise
from recast.patterns.sites import EmbeddingSite, MLPSite

H, W = 12, 20


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How a block's linears are put together; `gate` and `up` are features of `wide` where it is packed."""

    run: Callable[[Any, Tensor], Tensor]
    activation: str
    gate: str | None = None
    up: str = "up"


def packed(y: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = y.chunk(2, -1)
    return act(gate) * up


def woven(y: Tensor) -> Tensor:
    return F.silu(y[..., ::2]) * y[..., 1::2]


def swish(y: Tensor, factor: float) -> Tensor:
    return y * torch.sigmoid(y if factor == 1.0 else factor * y)


def written_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))


SPELLINGS = {
    "plain": Spelling(lambda m, x: m.down(F.relu(m.up(x))), "relu"),
    "squared": Spelling(lambda m, x: m.down(F.relu(m.up(x)).square()), "relu2"),
    "gelu": Spelling(lambda m, x: m.down(F.gelu(m.up(x))), "gelu"),
    "gelu by tanh": Spelling(lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")), "gelu_tanh"),
    "gelu written out": Spelling(lambda m, x: m.down(written_gelu(m.up(x))), "gelu_tanh"),
    "silu written out": Spelling(lambda m, x: m.down(swish(m.up(x), 1.0)), "silu"),
    "quick gelu": Spelling(lambda m, x: m.down(swish(m.up(x), 1.702)), "quick_gelu"),
    "hardswish": Spelling(lambda m, x: m.down(F.hardswish(m.up(x))), "hardswish"),
    "gated": Spelling(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), "silu", "gate"),
    "gated, other order": Spelling(lambda m, x: m.down(m.up(x) * F.gelu(m.gate(x))), "gelu", "gate"),
    "gated, scaled": Spelling(lambda m, x: m.down(0.5 * (F.silu(m.gate(x)) * m.up(x))), "silu", "gate"),
    "gated, cast": Spelling(lambda m, x: m.down((F.silu(m.gate(x).double()) * m.up(x)).float()), "silu", "gate"),
    "gated, norm inside": Spelling(lambda m, x: m.down(m.norm(F.silu(m.gate(x)) * m.up(x))), "silu", "gate"),
    "packed": Spelling(lambda m, x: m.down(packed(m.wide(x), F.silu)), "silu", "wide.gate", "wide.up"),
    "packed, woven": Spelling(lambda m, x: m.down(woven(m.wide(x))), "silu", "wide.gate", "wide.up"),
    "glu": Spelling(lambda m, x: m.down(F.glu(m.wide(x))), "sigmoid", "wide", "wide"),
    "in rows": Spelling(lambda m, x: m.down(F.relu(m.up(x.view(-1, H)))).view_as(x), "relu"),
}


class Block(nn.Module):
    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.gate, self.up, self.wide = nn.Linear(H, W), nn.Linear(H, W), nn.Linear(H, 2 * W, bias=False)
        self.down, self.norm = nn.Linear(W, H), nn.LayerNorm(W)
        self.run = spelling.run

    def forward(self, x: Tensor) -> Tensor:
        return x + self.run(self, x)


def found(model: nn.Module, *args: Tensor) -> Recognition:
    return recognise(recast.capture(model.eval(), args))


@pytest.mark.parametrize("name", SPELLINGS)
def test_block(name: str) -> None:
    spelling = SPELLINGS[name]
    result = found(Block(spelling), torch.randn(2, 4, H))
    (site,) = (s for s in result.sites if isinstance(s, MLPSite))
    assert site.activation == spelling.activation
    assert (site.gate and site.gate.name, site.up and site.up.name) == (spelling.gate, spelling.up)
    assert site.down is not None
    assert site.down.name == "down"
    assert site.x is not None
    assert site.x.op == "placeholder" or name == "in rows"
    assert not [m for m in result.misses if m.kind == "mlp"]


def across(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def conv(linear: nn.Linear, x: Tensor) -> Tensor:
    """The linear as a 1x1 convolution: of and to (batch, features, tokens)."""
    return F.conv1d(x, linear.weight[:, :, None], linear.bias)


def left(linear: nn.Linear, x: Tensor) -> Tensor:
    return across(linear.weight @ across(x)) + linear.bias


def in_rows(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.addmm(linear.bias, x.reshape(-1, H), linear.weight.t()).view(*x.shape[:-1], W)


TURNED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str | None]] = {
    "turned back": (lambda m, x: m.down(F.silu(across(conv(m.up, across(x))))), None),
    "turned back after the activation": (lambda m, x: m.down(across(F.silu(conv(m.up, across(x))))), None),
    "weight on the left": (lambda m, x: m.down(F.gelu(left(m.up, x))), None),
    "features in the middle": (lambda m, x: across(conv(m.down, F.gelu(conv(m.up, across(x))))), None),
    "last one turned": (lambda m, x: across(conv(m.down, across(F.relu(m.up(x))))), None),
    "permuted": (lambda m, x: m.down(F.relu(conv(m.up, x.permute(0, 2, 1)).permute(0, 2, 1))), None),
    "batch and tokens swapped": (lambda m, x: m.down(F.relu(m.up(x)).transpose(0, 1)).transpose(0, 1), None),
    "gate turned": (lambda m, x: m.down(F.silu(left(m.gate, x)) * m.up(x)), "gate"),
    "up turned": (lambda m, x: m.down(F.silu(m.gate(x)) * across(conv(m.up, across(x)))), "gate"),
    "both turned": (lambda m, x: m.down(across(F.silu(conv(m.gate, across(x))) * conv(m.up, across(x)))), "gate"),
    "gate in rows, up turned": (lambda m, x: m.down(F.silu(in_rows(m.gate, x)) * left(m.up, x)), "gate"),
    "gate cast, up turned": (lambda m, x: m.down(F.silu(m.gate(x.double().float())) * left(m.up, x)), "gate"),
}


@pytest.mark.parametrize("shape", [(1, H, H), (3, W, H)], ids=str)
@pytest.mark.parametrize("name", TURNED)
def test_block_of_turned_products(name: str, shape: tuple[int, ...]) -> None:
    run, gate = TURNED[name]
    result = found(Block(Spelling(run, "")), torch.randn(shape))
    (site,) = (s for s in result.sites if isinstance(s, MLPSite))
    pieces = [piece and piece.name for piece in (site.gate, site.up, site.down)]
    assert pieces == [gate, "up", "down"]
    assert not [m for m in result.misses if m.kind == "mlp"]


def test_names_and_nodes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(SPELLINGS["gated"]) for _ in range(3)])
            self.head = nn.Sequential(nn.Linear(H, W), nn.ReLU(), nn.Linear(W, 3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            y: Tensor = self.head(x)
            return y

    sites = [s for s in found(Model(), torch.randn(2, 4, H)).sites if isinstance(s, MLPSite)]
    assert [s.name for s in sites] == ["layers.0", "layers.1", "layers.2", "head"]
    assert set(sites[0].weights) == {f"layers.0.{n}.weight" for n in ("gate", "up", "down")}
    nodes = [node for site in sites for node in site.nodes]
    assert len(nodes) == len(set(nodes))
    assert [s.node for s in sites] == [s.nodes[-1] for s in sites]
    assert sites[0].to_dict()["gate"] == "layers.0.gate"


class Near(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def twice(m: Any, x: Tensor) -> Any:
    h = F.relu(m.a(x))
    return m.b(h) + m.c(h)


def shared(m: Any, x: Tensor) -> Any:
    h = F.relu(m.a(x))
    return m.b(h), h.sum()


NEAR: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "hidden values leave": (shared, "is used outside of the block too"),
    "two lasts": (twice, "its result enters b and c"),
    "turned": (lambda m, x: m.b(F.relu(m.a(x)).transpose(1, 2)), "turns dimensions between the products"),
    "turned once": (lambda m, x: m.b(F.relu(conv(m.a, across(x)))), "dimensions are turned between the products"),
    "one of two turned": (lambda m, x: m.c(F.silu(m.a(x)) * across(m.b(x))), "turns dimensions between the products"),
    "rows of one turned": (lambda m, x: m.c(F.silu(m.a(x)) * conv(m.b, across(x))), "are turned between the products"),
    "rows meet other rows": (
        lambda m, x: m.c(F.silu(m.a(x)) * across(conv(m.b, x))),
        "turns dimensions between the products",
    ),
    "turned and split": (
        lambda m, x: m.b(torch.cat(F.relu(across(conv(m.a, across(x)))).chunk(2, -1), -1)),
        "(cat) stands between the products",
    ),
    "shuffled": (
        lambda m, x: m.b(F.relu(left(m.a, x)).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)),
        "turns dimensions between the products",
    ),
    "summed": (lambda m, x: m.b(F.relu(m.a(x)).cumsum(1)), "(cumsum) stands between the products"),
    "bias first": (lambda m, x: m.b(F.relu(m.a.bias + x @ m.a.weight.T).cumsum(1)), "(cumsum) stands between"),
    "with the input": (lambda m, x: m.b(F.relu(m.a(x)) + x), "it is made of the input"),
    "two added": (lambda m, x: m.c(F.relu(m.a(x)) + m.b(x)), "are not multiplied with each other"),
    "three": (lambda m, x: m.c(F.relu(m.a(x)) * m.b(x) * m.c(x)), "made of 3 products"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_why(name: str) -> None:
    run, reason = NEAR[name]
    result = found(Near(run), torch.randn(2, H, H))
    assert not [s for s in result.sites if isinstance(s, MLPSite)]
    (miss,) = (m for m in result.misses if m.kind == "mlp")
    assert reason in miss.reason
    assert miss.where.startswith("tests/patterns/test_mlp.py:")


def test_linears_without_an_activation_are_no_block() -> None:
    result = found(Near(lambda m, x: m.b(m.a(x)) * 2), torch.randn(2, 4, H))
    assert not [s for s in result.sites if s.kind == "mlp"]
    assert not [m for m in result.misses if m.kind == "mlp"]


@pytest.mark.parametrize("tied", [False, True])
def test_embedding(tied: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(30, H), nn.Embedding(9, H)
            self.head = nn.Linear(H, 30, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.embed(ids) + self.positions(torch.arange(ids.shape[1])))
            return y

    result = found(Model(), torch.zeros(2, 4, dtype=torch.int64))
    sites = {s.name: s for s in result.sites if isinstance(s, EmbeddingSite)}
    assert sorted(sites) == ["embed.table" if tied else "embed", "positions"]
    words = sites["embed.table" if tied else "embed"]
    assert (words.rows, words.features, words.weights) == (30, H, ("embed.weight",))
    assert (words.head.name if words.head else None) == ("embed" if tied else None)
    assert sites["positions"].head is None
