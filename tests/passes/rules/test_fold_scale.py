"""Constant factors folded into the linears they come from."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.exact import done, golden, randomise, reasons, simplified

SHAPES = [(2, 3), (1, 3), (3, 5), (2, 1)]  # three heads: one shape has as many tokens


def inputs(width: int = 12) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(*shape, width, dtype=torch.float64),) for shape in SHAPES]


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype).repeat(2)
    low, high = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-high, low], -1) * angle.sin()


class Eager(nn.Module):
    """Attention written out, the factor at a place of choice."""

    def __init__(self, where: str = "scores", rotary: bool = False, norm: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.where, self.rotary, self.packed = where, rotary, packed
        if packed:
            self.qkv = nn.Linear(12, 36)
        else:
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.o = nn.Linear(12, 12)
        self.norm = nn.RMSNorm(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).split(12, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(b, t, 3, 4).transpose(1, 2) for p in parts)
        q = self.norm(q)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        factor = 1 / math.sqrt(4 + 3)
        if self.where == "query":
            q = q * factor
        if self.where == "key":
            k = k / 3.0
        scores = q @ k.transpose(-1, -2)
        if self.where == "scores":
            scores = scores * factor
        if self.where == "divided":
            scores = scores / 7.0
        y = torch.softmax(scores + torch.ones_like(scores).tril().log(), -1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, 12))


@pytest.mark.parametrize("where", ["scores", "divided", "query", "key"])
@pytest.mark.parametrize("rotary", [False, True])
def test_folded(where: str, rotary: bool, accept: bool) -> None:
    before, after = simplified(randomise(Eager(where, rotary)), inputs(), "fold_scale")
    assert len(done(after)) == 1
    assert done(after)[0].endswith("k" if where == "key" else "q")
    if where == "scores" and rotary:
        golden("fold_scale_rotary", before, after, accept)


def test_rows_of_a_packed_linear(accept: bool) -> None:
    before, after = simplified(randomise(Eager(packed=True)), inputs(), "fold_scale")
    assert done(after) == ["0.377964 -> qkv"]
    golden("fold_scale_packed", before, after, accept)


def test_a_norm_between_goes_to_the_keys() -> None:
    _, after = simplified(randomise(Eager(norm=True)), inputs(), "fold_scale")
    assert done(after) == ["0.377964 -> k"]


def test_a_norm_between_is_refused() -> None:
    _, after = simplified(randomise(Eager("query", norm=True)), inputs(), "fold_scale")
    assert not done(after)
    assert "'rms_norm' stands between it and the linear" in reasons(after) or "stands between" in reasons(after)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.o((q * 0.3) @ q.transpose(1, 2) @ x)


def test_a_query_that_is_read_unscaled_too_is_refused() -> None:
    _, after = simplified(randomise(Twice()), inputs(), "fold_scale")
    assert not done(after)
    assert "reads 'q' without the factor" in reasons(after)


class Between(nn.Module):
    """A query that something stands before, so that its movements are none of the linear alone."""

    def __init__(self, what: str, packed: bool) -> None:
        super().__init__()
        self.q, self.k, self.qk = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 24)
        self.what, self.packed = what, packed

    def between(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).to(x.dtype) if self.what == "cast" else -x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.packed:
            q, k = self.between(self.qk(x)).split(12, -1)
            return (torch.softmax((q @ k.transpose(1, 2)) * 0.3, -1) @ x,)
        q = self.between(self.q(x)).view(*x.shape[:2], 3, 4)
        scores = q.transpose(1, 2) @ self.k(x).view(*x.shape[:2], 3, 4).permute(0, 2, 3, 1)
        return torch.softmax(scores * 0.3, -1), q


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["cast", "negated"])
def test_what_is_read_behind_something_else_is_refused(what: str, packed: bool) -> None:
    _, after = simplified(randomise(Between(what, packed)), inputs(), "fold_scale")
    assert not done(after)
    assert "without the factor" in reasons(after)


class Fused(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.scale = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], 3, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_only_when_asked(scale: float | None) -> None:
    _, after = simplified(randomise(Fused(scale)), inputs(), "fold_scale")
    assert not done(after)
    _, after = simplified(randomise(Fused(scale)), inputs(), "fold_scale{fused=True}")
    assert done(after) == [f"{scale or 0.5} -> q"]


class Unlucky(nn.Module):
    """A factor on a sum of which one side is no linear, and one behind a square."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + x) * 0.5 + self.b(x).square() * 0.25 + 3.0 * x


def test_what_does_not_scale_along_stays() -> None:
    _, after = simplified(randomise(Unlucky()), inputs(), "fold_scale")
    assert not done(after)


class Direct(nn.Module):
    """Factors on linears themselves, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 0.5) * 3.0


def test_on_the_linear_itself() -> None:
    _, after = simplified(randomise(Direct()), inputs(), "fold_scale")
    assert done(after) == ["0.5 -> a", "3 -> b"]
    assert "mul" not in str(after)


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(self.q(x) @ self.k(x).transpose(1, 2) * 0.25 / 30) * 30, -1) @ x


def test_a_soft_cap_stays_whole() -> None:
    _, after = simplified(randomise(Capped()), inputs(), "fold_scale")
    assert done(after) == ["0.25 -> q"]
    assert "one half of a soft cap" in reasons(after)
