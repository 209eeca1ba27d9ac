"""What is known about a program is asked once, and again as soon as anything it rests on has changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.patterns.linear.find import find_linear
from recast.patterns.memo import remembered
from recast.patterns.program import Program

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def captured() -> Program:
    torch.manual_seed(0)
    return recast.capture(Model().eval(), (torch.randn(3, 6),))


def asked(program: Program) -> int:
    """How often the question has to be answered when it is asked twice."""
    calls: list[int] = []
    for _ in range(2):
        remembered(program, "test", lambda: calls.append(1))
    return len(calls)


def swap_operand(program: Program) -> None:
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    relu.args = (program.inputs()[0],)


def swap_target(program: Program) -> None:
    next(n for n in program.graph.nodes if n.target is aten.relu.default).target = aten.tanh.default


def change_weight(program: Program) -> None:
    with torch.no_grad():
        program.weights["first.weight"].mul_(2)


def release_weight(program: Program) -> None:
    program.weights["first.weight"].untyped_storage().resize_(0)


def replace_weight(program: Program) -> None:
    program.module.first.weight = nn.Parameter(torch.randn(6, 6))


def add_node(program: Program) -> None:
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    with program.graph.inserting_after(relu):
        program.graph.call_function(aten.neg.default, (relu,))


@pytest.mark.parametrize("change", [swap_operand, swap_target, change_weight, release_weight, replace_weight, add_node])
def test_an_answer_is_kept_until_something_changes(change: Callable[[Program], None]) -> None:
    program = captured()
    assert asked(program) == 1
    assert asked(program) == 0
    change(program)
    assert asked(program) == 1


def test_a_copy_has_a_memory_of_its_own() -> None:
    program = captured()
    sites = {site.uses[0].product for site in find_linear(program)[0]}
    other = program.copy()
    assert not other.memory
    assert sites.isdisjoint(site.uses[0].product for site in find_linear(other)[0])


def test_what_is_handed_out_is_the_callers_own() -> None:
    program = captured()
    find_linear(program)[0].clear()
    assert [site.name for site in find_linear(program)[0]] == ["first", "second"]
