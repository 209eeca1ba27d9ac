"""Neighbours of products that the triton target fuses, and those that it leaves and says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.lowering.activations import activation_after
from recast.lowering.triton import Triton
from recast.lowering.triton.serving.dequantizing import DEQUANTIZING
from recast.lowering.triton.serving.eight_bit import INTEGERS
from recast.lowering.triton.serving.low_rank import LOW_RANK
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F = nn.functional
INT4 = "int4(group=16)"


class Net(nn.Module):
    """Three layers, and what a function makes of them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48, bias=False), nn.Linear(32, 48)
        self.c = nn.Linear(48, 32)
        self.run = forward
        self.eval().to(DEVICE, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def lowered(model: nn.Module, form: str | dict[str, object], dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Rows of the report; the graph that is compiled gives what the program does, for one token and for several."""
    program = recast.capture(model, (torch.randn(3, 5, 32, device=DEVICE, dtype=dtype),))
    rewritten = recast.rewrite(program, recast.plan(program, form))
    inlined, rows = Triton()._inlined(rewritten)
    for shape in ((3, 5, 32), (3, 5, 32)):
        x = torch.randn(shape, device=DEVICE, dtype=dtype)
        assert_close(inlined(x), rewritten(x), terms=48)
    return rows


def operations(model: nn.Module, form: str) -> list[str]:
    program = recast.capture(model, (torch.randn(3, 5, 32, device=DEVICE),))
    inlined, _ = Triton()._inlined(recast.rewrite(program, recast.plan(program, form)))
    return [str(node.target) for node in inlined.graph.nodes if node.op == "call_function"]


def gated(net: Net, x: Tensor) -> Tensor:
    return x + net.c(F.silu(net.a(x)) * net.b(x))


@pytest.mark.parametrize(
    ("form", "kernel"),
    [(INT4, DEQUANTIZING), ("fp8", DEQUANTIZING), ("nf4(group=16)", DEQUANTIZING), ("int8", DEQUANTIZING)],
)
def test_a_gate_is_one_product_and_a_residual_part_of_the_next(form: str, kernel: str) -> None:
    net = Net(gated)
    assert lowered(net, form) == {
        "a": f"{kernel} + bias + silu + gate of 'b'",
        "b": f"{kernel} (one product with 'a')",
        "c": f"{kernel} + bias + residual",
    }
    assert operations(net, form) == ["recast.dequantizing_matmul.default"] * 2


def test_a_gate_of_rounded_inputs() -> None:
    rows = lowered(Net(lambda net, x: net.c(F.silu(net.a(x)) * net.b(x))), "int8(activations=true)")
    assert rows["a"] == f"{INTEGERS} + bias + silu + gate of 'b'"
    # One rounding of the input is left where there were two.
    found = operations(Net(lambda net, x: F.silu(net.a(x)) * net.b(x)), "int8(activations=true)")
    assert sum("amax" in name for name in found) == 1


def test_a_gate_of_another_form_is_a_factor() -> None:
    rules = [{"match": "a", "form": INT4}, {"match": "b", "form": "int8"}, {"match": "c", "form": "low_rank(rank=4)"}]
    rows = lowered(Net(gated), {"rules": rules})
    assert rows == {
        "a": f"{DEQUANTIZING} (not one product with 'b': scale differs in shape or dtype) + silu + factor",
        "b": f"{DEQUANTIZING} + bias",
        "c": f"{LOW_RANK} + bias + residual",
    }


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda net, x: F.gelu(net.b(x)), " + bias + gelu"),
        (lambda net, x: F.gelu(net.b(x), approximate="tanh"), " + bias + gelu_tanh"),
        (lambda net, x: F.relu(net.b(x)).pow(2), " + bias + relu2"),
        (lambda net, x: (y := net.b(x)) * torch.sigmoid(1.702 * y), " + bias + quick_gelu"),
        (lambda net, x: (y := net.b(x)) * torch.sigmoid(y), " + bias + silu"),
        (lambda net, x: F.relu(net.b(x)) + F.pad(x, (0, 16)), " + bias + relu + residual"),
        # What stays, and why.
        (lambda net, x: F.gelu(y := net.b(x)) + y.exp().amax(), " + bias (gelu apart: 2 read what comes before it)"),
        (lambda net, x: net.b(x) + F.pad(x, (0, 16))[:, :1], " + bias (residual apart: its shape is another)"),
        (lambda net, x: net.b(x) * x[:, :, :1], " + bias (factor apart: its shape is another)"),
        (
            lambda net, x: (net.b(x) + F.pad(x, (0, 16)).double()).float(),
            " + bias (residual apart: its dtype is another)",
        ),
        (
            lambda net, x: F.relu(net.b(x) + F.pad(x, (0, 16))),
            " + bias + residual (relu apart: it comes after residual)",
        ),
        (lambda net, x: F.softplus(net.b(x)), " + bias"),
        (lambda net, x: torch.add(net.b(x), F.pad(x, (0, 16)), alpha=2), " + bias"),
    ],
)
def test_neighbours(forward: Callable[[Net, Tensor], Tensor], said: str) -> None:
    assert lowered(Net(forward), INT4)["b"] == DEQUANTIZING + said


def test_a_product_that_others_read_stays_whole() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        gate = net.a(x)
        return F.silu(gate) * net.b(x) + gate

    rows = lowered(Net(forward), INT4)
    assert rows["a"] == f"{DEQUANTIZING} (silu apart: 2 read what comes before it)"
    assert rows["b"] == f"{DEQUANTIZING} + bias + factor + residual"


def test_one_weight_in_two_places_is_left_in_both() -> None:
    rows = lowered(Net(lambda net, x: F.silu(net.a(x)) * net.b(x) + F.silu(net.a(2 * x))), INT4)
    assert "not one product with 'b': values is read by others too" in rows["a"]


def test_16_bits_and_compiled() -> None:
    net = Net(gated, torch.bfloat16)
    rows = lowered(net, INT4, torch.bfloat16)
    assert rows["c"] == f"{DEQUANTIZING} + bias + residual"
    program = recast.capture(net, (torch.randn(3, 5, 32, device=DEVICE, dtype=torch.bfloat16),))
    rewritten = recast.rewrite(program, recast.plan(program, INT4))
    artifact = recast.lower(rewritten, "triton")
    assert {row.name: row.kernel for row in artifact.report.rows} == rows
    x = torch.randn(3, 5, 32, device=DEVICE, dtype=torch.bfloat16)
    assert_close(artifact(x), rewritten(x), terms=48)


def test_what_is_no_activation() -> None:
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.sigmoid.default, (x,))))
    graph.output((y, graph.call_function(aten.exp.default, (x,))))
    assert activation_after(x) is None  # something else reads x too
    assert activation_after(y) is None
