"""Common subexpressions and operations that do nothing."""

import torch
from torch import Tensor, nn

import recast
from tests.exact import done, golden, randomise, reasons, simplified

INPUTS = [
    (torch.linspace(-1, 1, b * t * 6, dtype=torch.float64).reshape(b, t, 6),) for b, t in ((2, 3), (1, 3), (3, 6))
]


class Repeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.linear(x.view(-1, 6)))
        b = torch.relu(self.linear(x.view(-1, 6)))
        return a * b + x.sum() * 1 - x.sum() * 1.0


def test_repeats(accept: bool) -> None:
    before, after = simplified(randomise(Repeats()), INPUTS, "common_subexpressions")
    assert len(done(after)) == 4
    assert sum("linear(" in line for line in str(after).splitlines()) == 1
    golden("common_subexpressions", before, after, accept)


class TwoResults(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x.exp()


def test_two_results_do_not_share_memory() -> None:
    _, after = simplified(TwoResults(), INPUTS, "common_subexpressions")
    assert not done(after)
    assert "the two would share memory" in reasons(after)
    first, second = after(*INPUTS[0])
    assert first.data_ptr() != second.data_ptr()


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x) + torch.dropout(x, 0.5, True) * torch.dropout(x, 0.5, True)


def test_chance_is_not_repeated() -> None:
    program = recast.capture(Random().eval(), INPUTS[0])
    after = recast.simplify(program, "common_subexpressions", verification=False)
    assert not done(after)
    assert str(after) == str(program)


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        y = y.view(y.shape).transpose(1, 2).transpose(1, 2) * 1.0 + 0.0
        y = y.permute(2, 0, 1).permute(1, 2, 0)[:, 0:]
        y = torch.cat(y.split([2, 4], -1), -1)
        return nn.functional.dropout(y.expand(y.shape), training=False) * 2


def test_idle(accept: bool) -> None:
    before, after = simplified(Idle(), INPUTS, "remove_idle")
    assert len([n for n in after.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]) == 2
    golden("remove_idle", before, after, accept)


class NotIdle(nn.Module):
    """Each of these looks idle and is not."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        swapped = y.transpose(0, 1).transpose(1, 2)
        flipped = torch.cat(y.split([3, 3], -1)[::-1], -1)
        crossed = torch.cat(y.split([3, 3], -1), 1)
        return (
            swapped.sum()
            + (flipped * y).sum()
            + (crossed * crossed.arange() if False else crossed).std()
            + (y * 1 - 1).sum()
        )


def test_not_idle() -> None:
    _, after = simplified(NotIdle(), INPUTS, "remove_idle")
    assert all("mul" in text for text in done(after))


class Whole(nn.Module):
    """The input itself, by way of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


def test_a_result_is_not_the_input() -> None:
    _, after = simplified(Whole(), INPUTS, "remove_idle")
    assert not done(after)
