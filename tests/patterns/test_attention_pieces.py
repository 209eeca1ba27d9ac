"""Attention within blocks, whose scores are written into a tensor piece by piece: its linears are named, its core is kept."""

import torch
from torch import Tensor, nn

import recast
from recast.passes.rules.raise_structures import raise_program
from recast.patterns.program import Program
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite, Mismatch
from tests.helpers import assert_close

H, BLOCK, LENGTH = 16, 4, 12


class Blocks(nn.Module):
    """Tokens of a block attend to their own block and to the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(1, (-1, BLOCK)) for f in (self.query, self.key, self.value))
        scores = torch.einsum("bcxd,bcyd->bcxy", q, k) / 4
        before = torch.einsum("bcxd,bcyd->bcxy", q[:, 1:], k[:, :-1]) / 4
        both = scores.new_full((*scores.shape[:3], 2 * BLOCK), -1e9)
        both[..., BLOCK:] = scores
        both[:, 1:, :, :BLOCK] = before
        weights = both.softmax(-1)
        seen = torch.cat([nn.functional.pad(v, (0, 0, 0, 0, 1, 0))[:, :-1], v], 2)
        return self.out(torch.einsum("bcxy,bcyd->bcxd", weights, seen).flatten(1, 2))


class WithoutValues(Blocks):
    """What is averaged is no linear's result."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Identity()  # type: ignore[assignment]


def made(model: nn.Module) -> tuple[Program, list[AttentionSite], list[Mismatch]]:
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, H, dtype=torch.float64)
    program = recast.capture(model.double().eval(), (x,), dynamic_shapes=(None,))
    found = recognise(program)
    sites = [s for s in found.sites if isinstance(s, AttentionSite)]
    return program, sites, [m for m in found.misses if m.kind == "attention"]


def test_linears_around_attention_in_blocks() -> None:
    model = Blocks()
    program, (site,), misses = made(model)
    assert not misses
    assert site.pattern == "attention_in_pieces"
    assert [piece.name for piece in (site.q, site.k, site.v, site.o) if piece] == ["query", "key", "value", "out"]
    assert site.notes == ("not raised: its scores are put together from pieces",)
    x = torch.randn(2, LENGTH, H, dtype=torch.float64)
    with torch.no_grad():
        assert_close(raise_program(program)(x), model(x), terms=H * LENGTH)


def test_all_four_linears_are_needed() -> None:
    _, sites, misses = made(WithoutValues())
    assert not sites
    assert misses
    assert all(m.reason for m in misses)
