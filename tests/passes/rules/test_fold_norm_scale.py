"""Scales and biases of norms, and constant vectors, folded into the linears that read them."""

import pytest
import torch
from torch import Tensor, nn

from tests.exact import done, golden, randomise, reasons, simplified

SHAPES = [(2, 3), (1, 3), (3, 7), (2, 1)]


def inputs(width: int = 6) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(*shape, width, dtype=torch.float64),) for shape in SHAPES]


class Block(nn.Module):
    def __init__(self, norm: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.residual = norm, residual
        self.gate, self.up = nn.Linear(6, 10, bias=False), nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        y = self.down(torch.sigmoid(self.gate(n)) * self.up(n))
        return y + n if self.residual else y + x


class WrittenOut(nn.Module):
    """RMSNorm as transformers writes it; `offset` for a weight stored less one."""

    def __init__(self, offset: bool = False) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(6)), offset

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y * (1.0 + self.weight) if self.offset else self.weight * y


class ByOneNumber(nn.Module):
    """One number for all features, left of x, so that no value is the norm without it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


NORMS = {
    "layer_norm": nn.LayerNorm(6),
    "layer_norm_without_bias": nn.LayerNorm(6, bias=False),
    "rms_norm": nn.RMSNorm(6, eps=1e-5),
    "written_out": WrittenOut(),
    "weight_less_one": WrittenOut(offset=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_into_both_readers(name: str, accept: bool) -> None:
    before, after = simplified(randomise(Block(NORMS[name])), inputs(), "fold_norm_scale")
    assert len(done(after)) == 1
    assert "norm.weight" not in after.weights
    assert set(after.successors_of("norm.weight")) == {"gate.weight", "up.weight"}
    assert "gate.weight" in after.originals_of("gate.weight")
    if name in ("layer_norm", "written_out"):
        golden(f"fold_norm_scale_{name}", before, after, accept)


def test_a_residual_that_reads_the_norm_keeps_it() -> None:
    _, after = simplified(randomise(Block(nn.LayerNorm(6), residual=True)), inputs(), "fold_norm_scale")
    assert not done(after)
    assert "'add" in reasons(after)
    assert "which is no linear over its last dimension" in reasons(after)


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        return self.head(n), n


def test_a_norm_that_is_a_result_stays() -> None:
    _, after = simplified(randomise(Returned()), inputs(), "fold_norm_scale")
    assert "the program gives it back as a result" in reasons(after)
    assert not done(after)


class Between(nn.Module):
    """A product that is a result itself, shifted before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.a = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x + self.before)
        return y, y + self.behind


def test_a_shift_behind_a_linear_that_took_one() -> None:
    _, after = simplified(randomise(Between()), inputs(), "fold_norm_scale")
    assert done(after) == ["before -> a"]
    assert "gives it back as a result" in reasons(after)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.table(ids)), self.table.weight)


def test_a_head_tied_to_the_embedding_stays() -> None:
    _, after = simplified(randomise(TiedHead()), [(torch.tensor([[1, 5, 8]]),)], "fold_norm_scale")
    assert not done(after)
    assert "'table' cannot take it: its weight 'table.weight' is also read by 'embedding'" in reasons(after)


class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.linear = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.one(x)) + self.linear(self.two(x))


def test_a_linear_behind_two_norms_stays() -> None:
    _, after = simplified(randomise(SharedLinear()), inputs(), "fold_norm_scale")
    assert not done(after)
    assert "its weight 'linear.weight' is also read by 'linear" in reasons(after)


class Viewed(nn.Module):
    """A norm flattened for `addmm` with a transposed weight, and one token of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.weight, self.bias = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(5))
        self.pooler = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        y = torch.addmm(self.bias, n.view(-1, 6), self.weight).view(*x.shape[:-1], 5)
        return y, self.pooler(n[:, 0])


def test_through_views(accept: bool) -> None:
    before, after = simplified(randomise(Viewed()), inputs(), "fold_norm_scale")
    assert len(done(after)) == 1
    golden("fold_norm_scale_views", before, after, accept)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x).transpose(1, 2))


def test_a_linear_over_another_dimension_stays() -> None:
    """Six tokens of six features: a rewrite that looks at sizes alone would take the wrong dimension."""
    _, after = simplified(randomise(Turned()), [(torch.randn(2, 6, 6, dtype=torch.float64),)], "fold_norm_scale")
    assert not done(after)


@pytest.mark.parametrize("name", NORMS)
def test_raised_norms(name: str) -> None:
    _, after = simplified(randomise(Block(NORMS[name])), inputs(), "raise_structures{kinds=norm},fold_norm_scale")
    assert len([text for text in done(after) if " -> gate, up" in text]) == 1
    assert "norm.weight" not in after.weights


def test_one_number_is_no_vector() -> None:
    """A raised norm whose weight is one number keeps it: its linears' columns are as many as the features."""
    _, after = simplified(randomise(Block(ByOneNumber())), inputs(), "raise_structures,fold_norm_scale")
    assert "norm.weight" in after.weights
    assert any(getattr(node.target, "__name__", "") == "rms_norm" for node in after.graph.nodes)
