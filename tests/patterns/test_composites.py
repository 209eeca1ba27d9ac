"""Composite operations written out one by one give the operations that tracing everything anew gives."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.patterns.capture import export
from tests.helpers import assert_close


class Spellings(nn.Module):
    """Views, casts and copies in composite spellings, some of which copy for these strides and some do not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(12, 24), nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(24.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.drop(self.up(x)).unflatten(-1, (4, 6)).transpose(1, 2)
        flat = y.reshape(x.shape[0], -1) + y.contiguous().flatten(1)
        a, b = self.up(x).chunk(2, -1)
        z = self.norm(self.up(x).mT).mT.to(torch.float64).type_as(x)
        return flat.sum(-1), (a @ b.mT).float(), z + self.table.view_as(z[0, 0]).expand_as(z)


class InPlace(Spellings):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.up(x)
        y[:, 0].add_(1)
        return (y.reshape(-1, 24),)


class OneSize(Spellings):
    """Tokens are left free at first and settled by a table further on."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.up(x.transpose(1, 2).reshape(x.shape[0], 12, 5).mT) + self.table,)


def operations(program: recast.Program) -> Counter[str]:
    """How often each operation on tensors is called; how sizes are multiplied is not looked at."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    return Counter(str(n.target) for n in calls)


@pytest.mark.parametrize("model", [Spellings, InPlace, OneSize], ids=lambda m: m.__name__)
def test_as_traced_anew(model: type[Spellings], monkeypatch: pytest.MonkeyPatch) -> None:
    made = model().eval()
    x = torch.randn(3, 5, 12)
    program = recast.capture(made, (x,))
    assert not any(
        n.target._schema.is_mutable for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    )
    for batch in (1, 4):
        given = torch.randn(batch, 5, 12)
        for found, wanted in zip(program(given), made(given), strict=True):
            assert_close(found, wanted, terms=24 * 12)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default)
    monkeypatch.setattr(export, "can_be_expanded", lambda module: False)
    assert operations(program) == operations(recast.capture(made, (x,)))


def test_training_is_traced_anew() -> None:
    """What a batch norm keeps of its batches is written to, though its schema does not say so."""
    program = recast.capture(Spellings().train(), (torch.randn(3, 5, 12),))
    assert {target for _, _, target in program.interface.mutations} >= {"norm.running_mean", "norm.running_var"}
