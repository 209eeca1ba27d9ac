"""Linears of one input merged and split again: text, numbers, names, and what must not be merged."""

import pytest
import torch
from torch import Tensor, nn

import recast
from tests.exact import done, golden, randomise, reasons, simplified
from tests.helpers import assert_close

SHAPES = [(2, 3), (1, 3), (3, 7), (2, 1)]


class Attention(nn.Module):
    """Three linears with one input; K has no bias; heads as many as tokens in one of the shapes."""

    def __init__(self, width: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1)) + x


class Gated(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def inputs(width: int = 6) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(*shape, width, dtype=torch.float64),) for shape in SHAPES]


def test_query_key_value(accept: bool) -> None:
    before, after = simplified(randomise(Attention()), inputs(), "merge_linears")
    assert done(after) == ["q_proj + k_proj + v_proj -> q_k_v_proj"]
    golden("merge_linears_qkv", before, after, accept)
    (packed,) = [s for s in recast.find(after) if s.name == "q_k_v_proj"]
    assert isinstance(packed, recast.LinearSite)
    assert [(p.name, p.size) for p in packed.parts] == [("q", 6), ("k", 6), ("v", 6)]


def test_names_lead_there_and_back() -> None:
    before, after = simplified(randomise(Attention()), inputs(), "merge_linears")
    assert after.originals_of("q_k_v_proj.weight") == ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    assert after.successors_of("k_proj.weight") == ("q_k_v_proj.weight",)
    assert after.successors_of("o_proj.weight") == ("o_proj.weight",)
    assert after.originals_of("o_proj.weight") == ("o_proj.weight",)
    made = after.derived["q_k_v_proj.bias"].value(before.weights)
    assert torch.equal(made[6:12], torch.zeros(6, dtype=torch.float64))
    assert torch.equal(made, after.weights["q_k_v_proj.bias"])
    assert before.nbytes() + 6 * 8 == after.nbytes()  # K's bias of zeros


def test_split_packed_brings_the_original_weights_back() -> None:
    model = randomise(Attention())
    before, merged = simplified(model, inputs(), "merge_linears")
    parted = recast.simplify(merged, "split_packed")
    for name, weight in before.weights.items():
        assert torch.equal(weight, parted.weights[name]), name
    x = inputs()[2]
    assert_close(parted(*x), model(*x), terms=64)
    assert recast.simplify(parted, "merge_linears").derived["q_k_v_proj.weight"] == merged.derived["q_k_v_proj.weight"]


def test_gate_and_up(accept: bool) -> None:
    before, after = simplified(randomise(Gated()), inputs(), "merge_linears")
    assert done(after) == ["gate + up -> gate_up"]
    golden("merge_linears_gate_up", before, after, accept)


class Stacked(nn.Module):
    """A pair that reads one of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(x) * self.c(y) + self.d(y)


def test_pairs_behind_each_other() -> None:
    _, after = simplified(randomise(Stacked()), inputs(), "merge_linears")
    assert done(after) == ["a + b -> a_b", "c + d -> c_d"]


class Packed(nn.Module):
    """One linear, viewed, then split unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 14)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 6)).view(*x.shape[:-1], 14).split([6, 4, 4], dim=-1)
        return torch.cat([torch.relu(v), k.exp(), q.sin()], -1)


def test_split_packed(accept: bool) -> None:
    before, after = simplified(randomise(Packed()), inputs(), "split_packed")
    assert done(after) == ["qkv -> qkv.q, qkv.k, qkv.v"]
    golden("split_packed", before, after, accept)
    assert str(after.derived["qkv.k.weight"]) == "qkv.weight[6:10]"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.other = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.table(ids))
        return x @ self.table.weight.T, self.other(x)


def test_a_matrix_that_is_an_embedding_too_stays() -> None:
    model = randomise(Tied())
    _, after = simplified(model, [(torch.tensor([[1, 2, 4]]),)], "merge_linears")
    assert not done(after)
    assert "its weight 'table.weight' is also read by 'embedding'" in reasons(after)


class Shared(nn.Module):
    """The same two linears in two places, `alone` in only one of them."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x)) * self.b(x)
        return torch.tanh(self.a(x)) * (self.b(x) if self.together else x)


def test_shared_weights_merge_once() -> None:
    _, after = simplified(randomise(Shared(True)), inputs(), "merge_linears")
    assert done(after) == ["a + b -> a_b"]
    assert set(after.weights) == {"a_b.weight", "a_b.bias"}


def test_shared_weights_that_stand_alone_elsewhere_stay() -> None:
    _, after = simplified(randomise(Shared(False)), inputs(), "merge_linears")
    assert not done(after)
    assert "'a' is used 2 times, 1 of them with the others" in reasons(after)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 2) for _ in range(9)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([e(x) for e in self.experts]).sum(0)


def test_many_linears_stay_unless_asked_for() -> None:
    _, after = simplified(randomise(Many()), inputs(), "merge_linears")
    assert "9 linears read 'x', more than most=8" in reasons(after)
    _, after = simplified(randomise(Many()), inputs(), "merge_linears{most=9}")
    assert len(done(after)) == 1


class Parallel(nn.Module):
    """Attention and MLP beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Gated()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + self.mlp(x)


def test_modules_stay_apart_unless_asked_for() -> None:
    _, after = simplified(randomise(Parallel()), inputs(), "merge_linears")
    assert len(done(after)) == 2
    _, after = simplified(randomise(Parallel()), inputs(), "merge_linears{across=True}")
    assert len(done(after)) == 1


def test_other_inputs_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.flip(1))

    _, after = simplified(randomise(Two()), inputs(), "merge_linears")
    assert not done(after)


def test_a_view_that_needs_memory_in_order_becomes_a_reshape() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).view(x.shape[0], -1) + self.b(x).view(x.shape[0], -1)

    _, after = simplified(randomise(Flat()), inputs(), "merge_linears")
    assert len(done(after)) == 1


def test_saved_and_loaded(tmp_path: object) -> None:
    from recast.passes.serialize import program_from, program_to

    _, after = simplified(randomise(Attention()), inputs(), "merge_linears")
    again = program_from(*program_to(after))
    assert again.derived == after.derived
    assert str(again) == str(after)
    x = inputs()[1]
    assert torch.equal(again(*x), after(*x))


def test_only_exact_passes() -> None:
    program = recast.capture(Gated().eval(), (torch.randn(2, 3, 6),))
    with pytest.raises(recast.RecastError, match="'cast' is bounded, only exact passes"):
        recast.simplify(program, "cast{dtype=bf16}")
    with pytest.raises(recast.RecastError, match="takes a value like 8"):
        recast.simplify(program, "merge_linears{most=many}")
