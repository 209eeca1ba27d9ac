"""Part of a weight is rewritten: what stays of it, that plan and report add up to what is held, and that numbers stay right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recast
from recast.passes.cache import OperatorCache
from recast.passes.plan import Plan
from recast.patterns.errors import WeightError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program
from tests.helpers import assert_close
from tests.patterns.test_moe import WAYS, E, H, W, made

SOME = {"rules": [{"match": "re:.*experts\\.[134]\\..*", "form": "low_rank(rank=2)"}], "allow_larger": True}


def held(program: Program) -> int:
    """Bytes of all tensors a program runs on, counted here by themselves."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in program.storages()}
    return sum(storages.values())


def promised(program: Program, plan: Plan) -> int:
    """Bytes that are left when every entry keeps its word."""
    return held(program) + sum(entry.bytes_after - entry.bytes_before for entry in plan.entries.values())


def carried_out(program: Program, recipe: object, calibration: recast.Calibration | None = None) -> Program:
    """A rewritten program whose report tells what is held, and what is held beyond the plan."""
    cache = OperatorCache(None)
    plan = recast.plan(program, recipe, calibration, cache=cache, progress=False)
    assert plan.entries
    result = recast.rewrite(program, plan, cache=cache, progress=False, pictures=False)
    report = result.report.to_dict()
    assert report["bytes"] == {"before": held(program), "after": held(result)}
    rows = {row["name"]: row for row in report["sites"]}
    for name, entry in plan.entries.items():
        assert rows[name]["bytes_after"] == entry.bytes_after
        assert rows[name]["flops_after"] == entry.flops_after
    noted = [note for note in report["notes"] if note.startswith(("kept:", "tied:", "bytes:"))]
    assert held(result) <= promised(program, plan) or noted
    return result


# ------------------------------------------------------------------ some experts of a stack


@pytest.mark.parametrize("name", WAYS)
def test_experts_that_stay_dense_leave_the_stack(name: str) -> None:
    model, program = made(WAYS[name])
    result = carried_out(program, SOME)
    assert held(result) == promised(program, result.plan) < held(program)
    assert not [note for note in result.report.notes if note.startswith(("kept:", "bytes:"))]
    stacks = {n for n, w in program.weights.items() if w.ndim == 3}
    assert not stacks & set(result.weights)
    for stack in stacks:
        (rest,) = result.successors_of(stack)
        assert torch.equal(result.weights[rest], program.weights[stack][[0, 2]])
        assert str(result.derived[rest]) == f"{stack}[0:1, 2:3]"
    # The model with the matrices that the operators stand for in its stacks.
    for node in result.graph.find_nodes(op="call_module"):
        module = result.module.get_submodule(str(node.target))
        *_, number, stack = module.site.split(".")
        dense = module.operator.to_dense().detach()
        with torch.no_grad():
            matrix = getattr(model.layers[0].experts, stack)[int(number)]  # type: ignore[index, union-attr]
            matrix.copy_(dense if matrix.shape == dense.shape else dense.T)
    dtype = next(model.parameters()).dtype
    for batch, length in ((2, 5), (1, 1), (3, 7)):
        x = torch.randn(batch, length, H, dtype=dtype)
        with torch.no_grad():
            assert_close(result(x), model(x), terms=W * H * 8)


@pytest.mark.parametrize("numbers", ["0", "4", "[0-3]", "[124]", "[04]"])
@pytest.mark.parametrize("name", ["looked up", "in runs, custom operation"])
def test_any_of_them_may_stay(name: str, numbers: str) -> None:
    """With the dense form the result is the model's own, for runs of experts that stay at either end and between."""
    model, program = made(WAYS[name])
    rules = [
        {"match": f"re:.*experts\\.{numbers}\\..*", "form": "low_rank(rank=16)"}
    ]  # of rank 16 at most: nothing is lost
    result = carried_out(program, {"rules": rules, "allow_larger": True})
    assert not {n for n, w in program.weights.items() if w.ndim == 3} & set(result.weights)
    x = torch.randn(4, 9, H, dtype=torch.float64)
    with torch.no_grad():
        assert_close(result(x), model(x), terms=W * H * 8)


class Few(nn.Module):
    """A row meets the matrix whose number comes with it; numbers may count from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, 12, H, dtype=torch.float64))

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return torch.einsum("toi,ti->to", self.weight[numbers], x)


def test_numbers_that_count_from_the_end() -> None:
    torch.manual_seed(0)
    model = Few().eval()
    x, numbers = torch.randn(11, H, dtype=torch.float64), torch.randint(-E, E, (11,))
    program = recast.capture(model, (x, numbers))
    result = carried_out(
        program, {"rules": [{"match": "re:weight\\.[03]", "form": "low_rank(rank=12)"}], "allow_larger": True}
    )
    assert list(result.weights) == ["weight_rest"]
    for numbers in (torch.arange(-E, E), torch.arange(E), torch.arange(-E, 0)):
        x = torch.randn(len(numbers), H, dtype=torch.float64)
        with torch.no_grad():
            assert_close(result(x, numbers), model(x, numbers), terms=H, factor=64)


class Picked(nn.Module):
    """Rows of one parameter that products take apart: two neighbouring ones by a slice, others by `unbind`."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(48, 12))
        self.stack = nn.Parameter(torch.randn(3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.stack.unbind(0)
        q, k = F.linear(x, self.packed[:20]), F.linear(x, self.packed[20:48])
        return torch.cat([q, k, F.linear(x, a), F.linear(x, b), F.linear(x, c)], -1)


def test_matrices_that_are_picked_one_by_one() -> None:
    torch.manual_seed(0)
    model = Picked().eval()
    program = recast.capture(model, (torch.randn(4, 12),))
    names = [site.name for site in find_linear(program)[0]]
    assert names == ["packed", "packed#2", "stack.0", "stack.1", "stack.2"]
    rules = [{"match": name, "form": "int8"} for name in ("packed", "stack.1")]
    result = carried_out(program, {"rules": rules})
    assert held(result) == promised(program, result.plan)
    assert {n: tuple(w.shape) for n, w in result.weights.items()} == {
        "packed_rest": (28, 12),
        "stack_rest": (2, 12, 12),
    }
    x = torch.randn(5, 12)
    with torch.no_grad():
        found, wanted = result(x), model(x)
        assert torch.equal(found[:, 20:60], wanted[:, 20:60])  # k and the first of the stack
        assert torch.equal(found[:, 72:], wanted[:, 72:])
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02


# ------------------------------------------------------------------ where it cannot be done


class Regular(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stack = nn.Parameter(torch.randn(3, 12, 12))
        self.apart = nn.ParameterList(nn.Parameter(torch.randn(12, 12)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "several":
            return torch.bmm(x.expand(3, -1, -1), torch.stack(list(self.apart)))
        y = torch.bmm(x.expand(3, -1, -1), self.stack)
        if self.how == "read":
            return y + (self.stack * x.sum()).sum()
        return y.sum(0) + F.linear(x, self.stack.flatten(0, 1)[6:18])  # rows of two matrices


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ("read", "tied: mul still needs the dense weight of stack.1"),
        ("several", "kept: the dense weight 'apart.0' stays beside what is rewritten of it ("),
        ("across", "kept: the dense weight 'stack' stays beside what is rewritten of it (stack.1): 'stack"),
    ],
)
def test_what_stays_all_the_same_is_counted_and_named(how: str, note: str) -> None:
    torch.manual_seed(0)
    program = recast.capture(Regular(how).eval(), (torch.randn(5, 12),))
    names = [site.name for site in find_linear(program)[0]]
    chosen = "stack.1" if "stack.1" in names else names[1]
    cache = OperatorCache(None)
    plan = recast.plan(program, {"rules": [{"match": chosen, "form": "int8"}], "tied": True}, cache=cache)
    assert any(line.startswith(note) for line in plan.notes), plan.notes
    result = carried_out(program, {"rules": [{"match": chosen, "form": "int8"}], "tied": True})
    assert held(result) == promised(program, result.plan) > held(program)
    assert any(line.startswith(note) for line in result.report.notes)


def test_copies_outlive_a_weight_that_is_released() -> None:
    cache, weight = OperatorCache(None), nn.Parameter(torch.randn(4, 3, 2))
    first = cache.slices(weight, (0, 3), where="w")
    assert torch.equal(first, weight[[0, 3]])
    assert cache.slices(weight, (0, 3), where="w") is first
    with torch.no_grad():
        weight.add_(1)
    second = cache.slices(weight, (0, 3), where="w")
    assert torch.equal(second, weight[[0, 3]])
    weight.untyped_storage().resize_(0)
    assert cache.slices(weight, (0, 3), where="w") is second
    with pytest.raises(WeightError, match="'w' was released before the matrices in it that stay dense"):
        cache.slices(weight, (1,), where="w")


# ------------------------------------------------------------------ whole models


def mixtral(**more: Any) -> tuple[nn.Module, Tensor]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **more,
    )  # fmt: skip
    return MixtralForCausalLM(config), torch.randint(0, 64, (2, 7))


def qwen2_moe() -> tuple[nn.Module, Tensor]:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config: Any = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_experts=4,
        num_key_value_heads=2, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config), torch.randint(0, 64, (2, 7))


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=4)), torch.randint(
        0, 64, (2, 7)
    )


def gpt_neox() -> tuple[nn.Module, Tensor]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config: Any = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_position_embeddings=16
    )  # fmt: skip
    return GPTNeoXForCausalLM(config), torch.randint(0, 64, (2, 7))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mixtral": mixtral,
    "mixtral, looked up": lambda: mixtral(experts_implementation="batched_mm"),
    "mixtral, loop": lambda: mixtral(experts_implementation="eager"),
    "qwen2 moe, tied": qwen2_moe,
    "gpt2, tied, packed": gpt2,
    "gpt neox, packed": gpt_neox,
}
RECIPES: dict[str, object] = {
    "all": "int4",
    "without some": {"default": "int4", "exclude": ["*experts.0*", "*.q", "*.gate"]},
    "some": {"rules": [{"match": "re:.*(experts\\.[13]\\.|attn.*\\.[kv]$|attention.*\\.[kv]$).*", "form": "int4"}]},
    "tied too": {"default": "int8", "tied": True},
    "shared": {"default": "merged(2, group=4)", "exclude": ["lm_head"]},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    found, ids = MODELS[request.param]()
    return recast.capture(found.eval(), (ids,))


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan_and_reality_agree_or_a_note_says_why(model: Program, recipe: str) -> None:
    plan = recast.plan(model, RECIPES[recipe], cache=OperatorCache(None), progress=False)
    if not plan.entries:
        assert recipe == "shared"  # models of one layer without experts have nothing to share
        return
    result = carried_out(model, RECIPES[recipe])
    over = held(result) - promised(model, plan)
    kept = sorted(name for entry in plan.entries for name in _weights_of(model, entry) if name in result.weights)
    for name in kept:
        assert any(name.removesuffix(".weight") in note for note in result.report.notes), name
    if over > 0:
        assert any(note.startswith(f"bytes: {over:,} more are held") for note in result.report.notes)
    assert abs(over) <= 0.02 * held(model), "and that is little"
    if recipe != "tied too":
        assert held(result) < held(model)


def _weights_of(program: Program, name: str) -> tuple[str, ...]:
    sites = {site.name: site for site in find_linear(program)[0]}
    return sites[name if name in sites else name.rpartition(".")[0]].weights


def test_a_mixture_of_dense_and_packed_experts_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found, ids = mixtral()
    program = recast.capture(found.eval(), (ids,), {"use_cache": False})
    result = carried_out(program, {"default": "int8", "exclude": ["*experts.0*", "*experts.2*"]})
    with torch.no_grad():
        wanted = result(ids, use_cache=False)
    for target in ("eager", "onnx"):
        artifact = recast.lower(result, target)
        artifact.save(tmp_path / target)
        again = recast.load(tmp_path / target)
        for run in (artifact, again):
            assert_close(run(ids, use_cache=False).logits, wanted.logits, terms=32 * 56, factor=64)
    assert sum(f.stat().st_size for f in (tmp_path / "eager").rglob("*.safetensors")) < held(result) + 40_000


# ------------------------------------------------------------------ experts that share a matrix


def test_a_group_is_taken_or_refused_as_one() -> None:
    torch.manual_seed(0)
    found, ids = mixtral()
    program = recast.capture(found.eval(), (ids,))
    result = carried_out(program, {"rules": [{"match": "*experts*", "form": "merged(2)"}]})
    plan = result.plan
    assert len(plan.entries) == 8
    stacks = sum(w.nbytes for n, w in program.weights.items() if "experts" in n)
    assert held(result) == held(program) - stacks // 2
    # Two products on all rows stand for one on each row: twice the operations, however the experts are divided.
    before, after = (sum(getattr(e, f) for e in plan.entries.values()) for f in ("flops_before", "flops_after"))
    assert 2 * before <= after <= 2 * before + 16
    assert result.report.flops == (before, after)
    assert len(result.graph.find_nodes(op="call_module")) == 2 * 2
    sharing = [row for row in result.report.rows if row.same_as]
    assert len(sharing) == 4
    kernels = {row.name: f"kernel of {row.name}" for row in result.report.rows if not row.same_as}
    for row in result.report.on("there", kernels).rows:
        assert row.kernel == f"kernel of {row.same_as or row.name}"

    none = recast.plan(program, {"rules": [{"match": "*experts*", "form": "merged(4)"}]}, cache=OperatorCache(None))
    assert not none.entries
    reasons = [skip.reason for skip in none.skipped if "experts" in skip.name]
    assert len(reasons) == 8
    assert all("would not pay for the 4 matrices that share it: " in reason for reason in reasons)


@pytest.mark.parametrize("name", WAYS)
def test_experts_that_share_a_matrix_give_what_it_gives(name: str) -> None:
    model, program = made(WAYS[name])
    result = carried_out(program, {"rules": [{"match": "*experts*", "form": "merged(2)"}], "allow_larger": True})
    with torch.no_grad():
        for row in result.report.rows:
            node = next(
                n for n in result.graph.find_nodes(op="call_module")
                if result.module.get_submodule(str(n.target)).site == (row.same_as or row.name)
            )  # fmt: skip
            dense = result.module.get_submodule(str(node.target)).operator.to_dense()
            *_, number, stack = row.name.split(".")
            matrix = getattr(model.layers[0].experts, stack)[int(number)]  # type: ignore[index, union-attr]
            matrix.copy_(dense if matrix.shape == dense.shape else dense.T)
        x = torch.randn(3, 7, H, dtype=next(model.parameters()).dtype)
        assert_close(result(x), model(x), terms=W * H * 8)
