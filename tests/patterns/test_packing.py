"""Packed weights: however the model takes the result apart, the rows of each part are found and may be rewritten alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite

H, D = 4, 6  # heads and their width; the captured sequence is as long as there are heads
Parts = dict[str, tuple[tuple[int, int], ...]]


def rows(*pairs: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return pairs


PLAIN: Parts = {"q": rows((0, 24)), "k": rows((24, 48)), "v": rows((48, 72))}
INTERLEAVED: Parts = {
    name: tuple((start + 18 * head, start + 18 * head + 6) for head in range(H)) for name, start in (("q", 0), ("k", 6), ("v", 12))
}  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * 2).sin() + k.cos() * v


def split(y: Tensor) -> Tensor:
    return attend(*y.split(24, -1))


def sizes(y: Tensor) -> Tensor:
    return attend(*y.split([24, 24, 24], 2))


def chunk(y: Tensor) -> Tensor:
    return attend(*y.chunk(3, -1))


def slices(y: Tensor) -> Tensor:
    return attend(y[..., :24], y[..., 24:48], y[..., 48:])


def narrow(y: Tensor) -> Tensor:
    return attend(*(y.narrow(2, 24 * i, 24) for i in range(3)))


def unbind(y: Tensor) -> Tensor:
    return attend(*y.view(*y.shape[:2], 3, H, D).unbind(2))


def permuted(y: Tensor) -> Tensor:
    q, k, v = y.reshape(*y.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
    return attend(q, k, v)


def selected(y: Tensor) -> Tensor:
    y = y.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    return attend(y[0], y[1], y[2])


def transposed(y: Tensor) -> Tensor:
    return attend(*y.transpose(1, 2).contiguous().chunk(3, 1))


def neox(y: Tensor) -> Tensor:
    return attend(*y.view(*y.shape[:2], H, 3 * D).transpose(1, 2).chunk(3, -1))


def neox_slices(y: Tensor) -> Tensor:
    y = y.view(*y.shape[:2], H, 3 * D)
    return attend(y[..., :D], y[..., D : 2 * D], y[..., 2 * D :])


def grouped(y: Tensor) -> Tensor:
    q, k, v = y.split([48, 12, 12], -1)
    return attend(q[..., :12], k, v) + q[..., 12:24] + q[..., 24:36] + q[..., 36:]


def halves(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return nn.functional.silu(gate) * up


def five(y: Tensor) -> Tensor:
    a, b, c, d, e = y.split([1, 2, 3, 33, 33], -1)
    return a + b.sum(-1, keepdim=True) + c.sum(-1, keepdim=True) + d * e


def whole(y: Tensor) -> Tensor:
    return y.sin()


def whole_and_split(y: Tensor) -> Tensor:
    return y.sum() + attend(*y.chunk(3, -1))


def overlapping(y: Tensor) -> Tensor:
    return y[..., :48] + y[..., 24:]


def incomplete(y: Tensor) -> Tensor:
    return y[..., :24] + y[..., 24:48]


def over_tokens(y: Tensor) -> Tensor:
    first, second = y.chunk(2, 1)
    return first + second


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Parts]] = {
    "split": (split, PLAIN),
    "sizes": (sizes, PLAIN),
    "chunk": (chunk, PLAIN),
    "slices": (slices, PLAIN),
    "narrow": (narrow, PLAIN),
    "unbind": (unbind, PLAIN),
    "permuted": (permuted, PLAIN),
    "selected": (selected, PLAIN),
    "transposed": (transposed, PLAIN),
    "neox": (neox, INTERLEAVED),
    "neox_slices": (neox_slices, INTERLEAVED),
    "grouped": (grouped, {"q": rows((0, 48)), "k": rows((48, 60)), "v": rows((60, 72))}),
    "gate_up": (halves, {"gate": rows((0, 36)), "up": rows((36, 72))}),
    "key_value": (halves, {"k": rows((0, 36)), "v": rows((36, 72))}),
    "anything": (halves, {"0": rows((0, 36)), "1": rows((36, 72))}),
    "five": (five, {"0": rows((0, 1)), "1": rows((1, 3)), "2": rows((3, 6)), "3": rows((6, 39)), "4": rows((39, 72))}),
    "whole": (whole, {}),
    "whole_and_split": (whole_and_split, {}),
    "overlapping": (overlapping, {}),
    "incomplete": (incomplete, {}),
    "over_tokens": (over_tokens, {}),
}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 72) for name in CASES})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [take(self.layers[name](x)) for name, (take, _) in CASES.items()]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return recast.capture(Packed().eval(), (torch.randn(2, H, 8),))


@pytest.fixture(scope="module")
def sites(program: Program) -> dict[str, LinearSite]:
    return {s.name.removeprefix("layers."): s for s in find_linear(program)[0]}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_each_part(sites: dict[str, LinearSite], name: str) -> None:
    assert {part.name: part.rows for part in sites[name].parts} == CASES[name][1]


def test_each_part_can_be_rewritten_alone(program: Program, sites: dict[str, LinearSite]) -> None:
    """The first part of every packed weight changes; everything else stays to the bit."""
    rules = [{"match": f"layers.{n}.{next(iter(p))}", "form": "low_rank(rank=1)"} for n, (_, p) in CASES.items() if p]
    plan = recast.plan(program, {"rules": rules, "allow_larger": True}, cache=OperatorCache(None))
    assert len(plan.entries) == len(rules)
    result = recast.rewrite(program, plan, cache=OperatorCache(None), verification=False, pictures=False, measure=False)
    copy: Any = Packed()
    copy.load_state_dict({n: w.detach() for n, w in program.weights.items()})
    for node in result.graph.find_nodes(op="call_module"):
        module: Any = result.module.get_submodule(str(node.target))
        dense = module.operator.to_dense()
        dense = dense if module.order is None else dense[module.order]
        name = module.site.removeprefix("layers.")
        before = copy.layers[name].weight.data
        first, *others = sites[name].parts
        for start, stop in (r for part in others for r in part.rows):
            assert torch.equal(dense[start:stop], before[start:stop])
        changed = torch.cat([dense[start:stop] for start, stop in first.rows])
        assert int(torch.linalg.matrix_rank(changed, rtol=1e-4)) == 1
        before.copy_(dense)
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        for found, expected in zip(result(x), copy(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_uses_that_disagree_are_taken_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.other = nn.Linear(8, 72), nn.Linear(8, 72)

        def forward(self, x: Tensor) -> Tensor:
            return split(self.same(x)) + chunk(self.same(x * 2)) + split(self.other(x)) + self.other(x * 2)[..., :24]

    program = recast.capture(Twice().eval(), (torch.randn(2, 4, 8),))
    found = {s.name: [p.name for p in s.parts] for s in find_linear(program)[0]}
    assert found == {"same": ["q", "k", "v"], "other": []}


def test_a_slice_that_is_empty_is_no_part() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y = self.proj(x)
            return y[:, :5].sum(-1) + y[:, 7:].sum()

    program = recast.capture(Sliced().eval(), (torch.randn(2, 5, 24),), dynamic_shapes={"x": None})
    (site,) = find_linear(program)[0]
    assert site.parts == ()


def test_views_of_sizes_that_only_values_tell() -> None:
    """How many rows there are follows from the values of an input; rows of the weight are followed all the same."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H * D, 3 * H * D)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            tokens = counts.sum().item()
            torch._check(tokens == x.shape[0])
            q, k, v = (t.reshape(tokens, H, D) for t in self.qkv(x).chunk(3, -1))
            return attend(q, k, v)

    program = recast.capture(Counted().eval(), (torch.randn(7, H * D), torch.tensor([3, 4])))
    (site,) = find_linear(program)[0]
    assert [part.rows for part in site.parts] == [((0, 24),), ((24, 48),), ((48, 72),)]
