"""Spellings of attention that are near others: what is named, what is raised, and what is told of where nothing is found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.dialect import has_dialect
from recast.passes.rules.raise_structures import raise_program
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite, Mismatch
from tests.helpers import assert_close

H, D = 4, 6
Scores = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention of which each step may be written anew."""

    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(20, H * D), nn.Linear(H * D, 20)
        self.k, self.v = nn.Linear(20, kv_heads * D), nn.Linear(20, kv_heads * D)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / D**0.5

    def normalise(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeated = [a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v)]
        return self.normalise(self.score(q, repeated[0])) @ repeated[1]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (a.unflatten(-1, (-1, D)).transpose(1, 2) for a in self.made(x))
        return self.o(self.core(q, k, v).transpose(1, 2).flatten(2))


def looked(model: nn.Module) -> tuple[Program, list[AttentionSite], list[Mismatch]]:
    torch.manual_seed(0)
    program = recast.capture(model.double().eval(), (torch.randn(2, 5, 20).double(),))
    found = recognise(program)
    sites = [s for s in found.sites if isinstance(s, AttentionSite)]
    return program, sites, [m for m in found.misses if m.kind == "attention"]


def raised_alike(model: nn.Module, program: Program) -> Program:
    """The raised program, after it was held against the model, also with as many tokens as heads."""
    raised = raise_program(program, ("attention",))
    for batch, tokens in ((1, 3), (3, H)):
        x = torch.randn(batch, tokens, 20).double()
        with torch.no_grad():
            assert_close(raised(x), model(x), terms=20 * D)
    return raised


def names(site: AttentionSite) -> list[str | None]:
    return [p.name if p is not None else None for p in (site.q, site.k, site.v, site.o)]


BOUNDED: dict[str, tuple[Scores, float, float]] = {
    "scale behind": (lambda q, k: torch.tanh(q @ k.mT / 30) * 30 / 2, 0.5, 15.0),
    "scale on both sides": (lambda q, k: 30 * torch.tanh(0.3 * (q @ k.mT) / 30) * 0.5, 0.15, 15.0),
    "no cap": (lambda q, k: torch.tanh(q @ k.mT), 1.0, 1.0),
}


@pytest.mark.parametrize("spelling", list(BOUNDED))
def test_every_factor_behind_a_soft_cap_is_one_of_the_cap(spelling: str) -> None:
    model = Block()
    model.score, scale, cap = BOUNDED[spelling]  # type: ignore[method-assign]
    program, (site,), _ = looked(model)
    assert (site.scale, site.softcap) == (pytest.approx(scale), pytest.approx(cap))
    assert not site.notes
    assert has_dialect(raised_alike(model, program))


def test_what_is_masked_before_it_is_bounded_stays() -> None:
    class Masked(Block):
        def score(self, q: Tensor, k: Tensor) -> Tensor:
            return 5 * torch.tanh((q @ k.mT + torch.arange(k.shape[2])) / 5)

    program, (site,), _ = looked(model := Masked())
    assert site.notes[0].startswith("not raised")
    assert not has_dialect(raised_alike(model, program))


SWAPPED: dict[str, Scores] = {
    "product": lambda q, k: (k @ q.mT).mT * 0.5,
    "permute": lambda q, k: 0.5 * (k @ q.mT).permute(0, 1, 3, 2),
    "einsum": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q) * 0.5,
    "einsum and transpose": lambda q, k: torch.einsum("bhkd,bhqd->bhkq", k, q).mT * 0.5,
}


@pytest.mark.parametrize("spelling", list(SWAPPED))
def test_keys_are_what_the_normaliser_runs_along(spelling: str) -> None:
    """Also where keys stand on the left of the product, and there are fewer of their heads."""
    model = Block(kv_heads=2)
    model.score = SWAPPED[spelling]  # type: ignore[method-assign]
    program, (site,), _ = looked(model)
    assert names(site) == ["q", "k", "v", "o"]
    assert (site.heads, site.kv_heads, site.head_dim, site.scale) == (H, 2, D, 0.5)
    raised_alike(model, program)


def test_weights_that_are_transposed_stay() -> None:
    """Queries and keys are as many: the shape says nothing."""

    class Transposed(Block):
        def normalise(self, scores: Tensor) -> Tensor:
            return scores.softmax(-1).mT

    program, (site,), _ = looked(model := Transposed())
    assert site.notes[0].startswith("not raised")
    assert not has_dialect(raised_alike(model, program))


def test_a_factor_behind_the_mask_is_one_of_the_scale() -> None:
    class Outside(Block):
        def score(self, q: Tensor, k: Tensor) -> Tensor:
            return (q @ k.mT + torch.arange(k.shape[2])) * 0.25

    program, (site,), _ = looked(model := Outside())
    assert site.scale == 0.25
    assert site.notes[0].startswith("not raised")
    raised_alike(model, program)


def exponential(scores: Tensor) -> Tensor:
    e = scores.exp()
    return e / e.sum(-1, keepdim=True)


def largest_off(scores: Tensor) -> Tensor:
    return exponential(scores - scores.amax(-1, keepdim=True))


def logarithm(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1).exp()


@pytest.mark.parametrize("normalise", [exponential, largest_off, logarithm], ids=lambda f: f.__name__)
def test_a_softmax_spelled_by_exponentials(normalise: Callable[[Tensor], Tensor]) -> None:
    model = Block()
    model.normalise = normalise  # type: ignore[method-assign]
    program, (site,), misses = looked(model)
    assert names(site) == ["q", "k", "v", "o"]
    assert (site.normaliser, site.notes, misses) == ("softmax", (), [])
    assert has_dialect(raised_alike(model, program))


def off_by_one(scores: Tensor) -> Tensor:
    e = scores.exp()
    return e / (1 + e.sum(-1, keepdim=True))


def over_queries(scores: Tensor) -> Tensor:
    e = scores.exp()
    return e / e.sum(-2, keepdim=True)


class Talking(Block):
    """Heads are mixed before the softmax, or behind it."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind, self.heads = behind, nn.Linear(H, H)

    def normalise(self, scores: Tensor) -> Tensor:
        scores = scores.softmax(-1) if self.behind else scores
        scores = self.heads(scores.movedim(1, -1)).movedim(-1, 1)
        return scores if self.behind else scores.softmax(-1)


class KeysFirst(Block):
    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (off_by_one, "exponentiated"),
        (over_queries, "exponentiated"),
        ("before", "mixes the heads"),
        ("behind", "mixes the heads"),
        ("linear", "linear attention"),
    ],
)
def test_attention_in_another_form_is_told_of(case: Callable[[Tensor], Tensor] | str, reason: str) -> None:
    model = KeysFirst() if case == "linear" else Talking(case == "behind") if isinstance(case, str) else Block()
    if not isinstance(case, str):
        model.normalise = case  # type: ignore[method-assign]
    program, sites, (missed,) = looked(model)
    assert not sites
    assert reason in missed.reason
    assert "test_attention_spelled.py" in missed.where
    raised_alike(model, program)


def test_a_softmax_that_is_no_attention_is_not_told_of() -> None:
    """A router's weights behind attention, and probabilities at the end."""

    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(20, H)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * self.router(y).softmax(-1).amax(-1, keepdim=True) + y.log_softmax(-1).exp()

    _, sites, misses = looked(Routed())
    assert len(sites) == 1
    assert not misses


class Packed(Block):
    """One projection in any order of its parts."""

    def __init__(self, order: str, fused: bool = False) -> None:
        super().__init__()
        self.order, self.fused, self.packed = order, fused, nn.Linear(20, 3 * H * D)

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = dict(zip(self.order, self.packed(x).chunk(3, -1), strict=True))
        return parts["q"], parts["k"], parts["v"]

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v) if self.fused else super().core(q, k, v)


@pytest.mark.parametrize(("order", "fused"), [("vkq", False), ("kqv", True), ("qkv", False)])
def test_parts_of_a_packed_projection_are_named_by_what_becomes_of_them(order: str, fused: bool) -> None:
    _, (site,), _ = looked(Packed(order, fused))
    for role, piece in zip("qkv", (site.q, site.k, site.v), strict=True):
        assert piece is not None
        assert piece.name == f"packed.{role}"
        (part,) = [p for p in piece.site.parts if p.name == role]
        start = order.index(role) * H * D
        assert part.rows == ((start, start + H * D),)


def test_the_half_of_a_projection_that_is_used_is_a_part() -> None:
    class Half(Block):
        def __init__(self) -> None:
            super().__init__()
            self.kv = nn.Linear(20, 2 * H * D)

        def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.q(x), self.k(x), self.kv(x)[..., : H * D]

    _, (site,), _ = looked(Half())
    assert names(site) == ["q", "k", "kv.v", "o"]
    assert site.v is not None
    assert [(p.name, p.rows) for p in site.v.site.parts] == [("v", ((0, H * D),)), ("unused", ((H * D, 2 * H * D),))]


def test_heads_of_grouped_queries_in_two_dimensions() -> None:
    """(batch, key heads, queries of each, tokens, features), never flattened."""

    class Grouped(Block):
        def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.einsum("bkgte,bkse->bkgts", q.unflatten(1, (2, 2)), k).softmax(-1)
            return torch.einsum("bkgts,bkse->bkgte", weights, v).flatten(1, 2)

    program, (site,), _ = looked(model := Grouped(kv_heads=2))
    assert (site.heads, site.kv_heads, site.head_dim) == (H, 2, D)
    raised_alike(model, program)
