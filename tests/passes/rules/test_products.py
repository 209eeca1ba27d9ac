"""Adapters folded into their linear, and linears in a row multiplied."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import recast
from tests.exact import done, golden, randomise, reasons, simplified
from tests.helpers import assert_close

SHAPES = [(2, 3), (1, 3), (3, 7), (2, 1)]


def inputs(width: int = 12) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(*shape, width, dtype=torch.float64),) for shape in SHAPES]


class Conv1D(nn.Module):
    """A linear stored transposed and multiplied flat, as in GPT-2."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(into, out)), nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Adapted(nn.Module):
    """A linear with low-rank adapters beside it, in the order and with the dropout of training libraries."""

    def __init__(self, base: nn.Module, adapters: int = 1, bias: bool = False, factor: float = 0.5) -> None:
        super().__init__()
        self.base_layer, self.factor = base, factor
        self.lora_A = nn.ModuleList([nn.Linear(12, 2 + i, bias=bias) for i in range(adapters)])
        self.lora_B = nn.ModuleList([nn.Linear(2 + i, 10, bias=bias) for i in range(adapters)])
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for a, b in zip(self.lora_A, self.lora_B, strict=True):
            y = y + b(a(self.dropout(x))) * self.factor
        return y


CASES = {
    "one": Adapted(nn.Linear(12, 10)),
    "no_bias": Adapted(nn.Linear(12, 10, bias=False)),
    "three": Adapted(nn.Linear(12, 10), adapters=3),
    "with_biases": Adapted(nn.Linear(12, 10, bias=False), bias=True),
    "factor_one": Adapted(nn.Linear(12, 10), factor=1.0),
    "transposed": Adapted(Conv1D(12, 10)),
}


@pytest.mark.parametrize("name", CASES)
def test_adapters(name: str, accept: bool) -> None:
    before, after = simplified(randomise(CASES[name]), inputs(), "fold_adapters")
    assert len(done(after)) == (3 if name == "three" else 1)
    assert set(after.weights) <= {"base_layer.weight", "base_layer.bias"}
    assert after.originals_of("base_layer.weight")[:3] == ("base_layer.weight", "lora_B.0.weight", "lora_A.0.weight")
    if name in ("one", "transposed"):
        golden(f"fold_adapters_{name}", before, after, accept)


class Elsewhere(nn.Module):
    """An adapter on another input, one whose inner value is read, one whose base is read."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.w, self.a, self.b, self.case = nn.Linear(12, 12), nn.Linear(12, 2), nn.Linear(2, 12), case

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x.relu() if self.case == "input" else x)
        y = self.w(x)
        z = y + self.b(inner) * 2.0
        if self.case == "inner":
            return z + inner.sum(-1, keepdim=True)
        return z * y if self.case == "base" else z


@pytest.mark.parametrize("case", ["input", "inner", "base"])
def test_what_only_looks_like_an_adapter_stays(case: str) -> None:
    _, after = simplified(randomise(Elsewhere(case)), inputs(), "fold_adapters")
    assert not done(after)
    if case == "base":
        assert "'w' is also read without the adapter" in reasons(after)


def test_float32_rounds_once() -> None:
    model = randomise(Adapted(nn.Linear(12, 10))).float()
    program = recast.simplify(recast.capture(model, (torch.randn(2, 3, 12),)), "fold_adapters")
    wanted = model.base_layer.weight.double() + 0.5 * model.lora_B[0].weight.double() @ model.lora_A[0].weight.double()
    assert torch.equal(program.weights["base_layer.weight"], wanted.float())


class Row(nn.Module):
    def __init__(self, *widths: int, between: nn.Module | None = None) -> None:
        super().__init__()
        pairs = enumerate(itertools.pairwise(widths))
        self.linears = nn.ModuleList([nn.Linear(a, b, bias=i != 1) for i, (a, b) in pairs])
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = self.between(linear(x))
        return x


def test_two_in_a_row(accept: bool) -> None:
    before, after = simplified(randomise(Row(12, 9, 5)), inputs(), "multiply_adjacent")
    assert done(after) == ["linears.0 linears.1 -> linears.1"]
    golden("multiply_adjacent", before, after, accept)


def test_a_chain_becomes_one() -> None:
    _, after = simplified(randomise(Row(12, 9, 9, 9, 4)), inputs(), "multiply_adjacent")
    assert len(done(after)) == 3
    assert set(after.weights) == {"linears.3.weight", "linears.3.bias"}


def test_a_bottleneck_stays() -> None:
    _, after = simplified(randomise(Row(12, 2, 12)), inputs(), "multiply_adjacent")
    assert not done(after)
    assert "a bottleneck of 2: the product would have 144 elements, the two have 48" in reasons(after)


def test_something_between_stays() -> None:
    _, after = simplified(randomise(Row(12, 9, 5, between=nn.Tanh())), inputs(), "multiply_adjacent")
    assert not done(after)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), y


def test_a_first_result_that_is_read_elsewhere_stays() -> None:
    _, after = simplified(randomise(ReadTwice()), inputs(), "multiply_adjacent")
    assert not done(after)
    assert "'output' also reads 'a'" in reasons(after)


def test_flat_products_in_a_row() -> None:
    model = randomise(nn.Sequential(Conv1D(12, 9), Conv1D(9, 5)))
    before, after = simplified(model, inputs(), "multiply_adjacent")
    assert len(done(after)) == 1
    x = inputs()[2][0]
    assert_close(after(x), before(x), terms=12 * 9)
