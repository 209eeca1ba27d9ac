"""The plan-wide compute dtype: where it goes, what stays in float32, and that the numbers hold."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.passes.base import Context, Pipeline, Soundness
from recast.passes.cache import OperatorCache
from recast.passes.plan import Plan
from recast.passes.rules.cast import Cast, main_dtype
from recast.passes.verify import bounded_bound
from recast.passes.verify import check as verify
from recast.patterns.errors import PlanError
from recast.patterns.program import Program
from tests.helpers import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cast(program: Program, dtype: str, *, check: bool = True) -> Program:
    context = Context(Plan("", {}), None, OperatorCache(None))
    step = Cast(dtype)
    result = step.run(program, context)
    if check:
        verify(program, result, step, context)
    return result


def dtypes(program: Program, name: str) -> list[torch.dtype]:
    """Dtypes of the results of all operations of a name."""
    return [n.meta["val"].dtype for n in program.graph.nodes if getattr(n.target, "_opname", "") == name]


def operand_dtypes(program: Program, name: str) -> set[torch.dtype]:
    values = [
        v.meta["val"]
        for n in program.graph.nodes
        if getattr(n.target, "_opname", "") == name
        for v in n.all_input_nodes
    ]
    return {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


class Model(nn.Module):
    """Tables of positions, a mask of -3.4e38, written-out attention and norm: the hazards of a narrow dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm, self.out = (
            nn.Embedding(20, 32),
            nn.Linear(32, 96),
            nn.LayerNorm(32),
            nn.Linear(32, 5),
        )
        self.register_buffer("frequencies", 10000 ** (-torch.arange(16) / 16))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1]).float()[:, None] * self.frequencies
        rotation = torch.cat([angle.cos(), angle.sin()], -1)
        hidden = (1.0 - mask[:, None, :].float()) * torch.finfo(torch.float32).min
        q, k, v = self.qkv(self.norm(x) * rotation).chunk(3, -1)
        x = x + (q @ k.transpose(1, 2) / math.sqrt(32) + hidden).softmax(-1) @ v
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.out(x), x.argmax(-1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    mask[2, :] = 0  # a row of nothing but padding must not turn to NaN
    return torch.randint(0, 20, (3, 9), generator=generator), mask


@pytest.fixture(scope="module")
def program(model: nn.Module, example: tuple[Tensor, Tensor]) -> Program:
    return recast.capture(model, example)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", BF16), ("fp16", FP16)])
def test_activations_and_weights_change_while_the_interface_stays(
    program: Program, example: tuple[Tensor, Tensor], name: str, dtype: torch.dtype
) -> None:
    result = cast(program, name)
    logits, best = result(*example)
    expected, _ = program(*example)
    assert (logits.dtype, best.dtype) == (FP32, torch.int64)
    assert cosine(logits, expected) > 1 - 30 * float(torch.finfo(dtype).eps) ** 2
    assert bool(torch.isfinite(logits).all())
    held = {n: w.dtype for n, w in result.weights.items()}
    assert held.pop("frequencies") is FP32
    assert set(held.values()) == {dtype}
    assert (
        operand_dtypes(result, "linear")
        == {dtype}
        == operand_dtypes(result, "matmul")
        == operand_dtypes(result, "layer_norm")
    )
    assert program.weights["qkv.weight"].dtype is FP32, "the program given is not changed"


def test_reductions_and_what_only_feeds_them_run_in_float32(program: Program) -> None:
    result = cast(program, "bf16")
    for name in ("softmax", "mean", "pow", "rsqrt", "div", "cos", "sin"):
        assert operand_dtypes(result, name) == {FP32}, name


def test_weights_keep_their_names_and_take_half_the_bytes(program: Program) -> None:
    result = cast(program, "bf16")
    assert list(result.weights) == list(program.weights)
    narrow = sum(w.nbytes for n, w in program.weights.items() if n != "frequencies") / 2
    assert result.nbytes() == narrow + program.weights["frequencies"].nbytes


def test_to_the_dtype_it_has_changes_nothing(program: Program) -> None:
    assert str(cast(program, "fp32")) == str(program)


def test_a_bf16_model_computes_in_fp32_and_gives_bf16_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(BF16).eval()
    x = torch.randn(5, 16, dtype=BF16)
    program = recast.capture(model, (x,))
    result = cast(program, "fp32")
    assert main_dtype(program) is BF16
    assert result(x).dtype is BF16
    assert operand_dtypes(result, "linear") == {FP32}
    exact = model.float()(x.float())
    assert float((result(x).float() - exact).detach().abs().max()) <= float(exact.detach().abs().max()) * 2**-8


def compute(forward: Callable[[nn.Module, Tensor], Any], x: Tensor, dtype: str = "bf16") -> tuple[Program, Any, Any]:
    """Cast a model of one linear around something, and run it before and after."""
    torch.manual_seed(0)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(x.shape[-1], x.shape[-1])
            self.conv = nn.Conv2d(3, 4, 3)
            self.stats = nn.BatchNorm2d(4)
            self.lower = nn.Parameter(torch.randn(x.shape[-1], 2))
            self.register_buffer("counter", torch.zeros(x.shape[-1]))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    program = recast.capture(Around().eval(), (x,))
    result = cast(program, dtype)
    return result, program(x), result(x)


def test_a_dtype_the_model_asks_for_itself_is_kept() -> None:
    result, before, after = compute(
        lambda m, x: (m.linear(x).double().exp(), m.linear(x).sum(-1, dtype=torch.float64)), torch.randn(3, 8)
    )
    assert [t.dtype for t in after] == [torch.float64, torch.float64]
    assert dtypes(result, "exp") == [torch.float64]
    assert all(cosine(a, b) > 0.9999 for a, b in zip(before, after, strict=True))


def test_infinite_masks_stay_infinite() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], x.shape[0]).masked_fill(
            torch.ones(x.shape[0], x.shape[0]).triu(1) > 0, -math.inf
        )
        h = m.linear(x)
        return nn.functional.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=mask)

    _, before, after = compute(forward, torch.randn(6, 8), "fp16")
    assert cosine(before, after) > 0.99999
    assert_close(after[0, 0].half(), before[0, 0], terms=8)  # the first row sees itself only


def test_constants_beyond_the_range_become_its_ends() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.linear(x)
        return (h.masked_fill(x > 0.3, -1e9) * 0.0 + h).relu()  # 0 * infinity would be NaN

    result, before, after = compute(forward, torch.randn(6, 8), "fp16")
    assert "masked_fill.Scalar(linear, gt, -65504.0)" in str(result)
    assert cosine(before, after) > 0.99999


def test_an_absent_epsilon_stays_that_of_the_captured_dtype() -> None:
    result, before, after = compute(lambda m, x: nn.functional.rms_norm(m.linear(x) * 1e-3, (8,)), torch.randn(5, 8))
    assert cosine(before, after) > 0.9999
    assert float((before - after).detach().abs().max()) < 0.05, (
        "bf16's own eps of 0.008 would shrink these values to nothing"
    )
    assert operand_dtypes(result, "rms_norm") in ({BF16}, set())


def test_batch_statistics_stay_in_float32() -> None:
    result, before, after = compute(lambda m, x: m.stats(m.conv(x)).relu(), torch.randn(2, 3, 9, 8))
    assert cosine(before, after) > 0.9999
    assert result.weights["stats.running_var"].dtype is FP32
    assert result.weights["conv.weight"].dtype is BF16


def test_written_buffers_keep_their_dtype() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.linear(x)
        m.counter.add_(h.sum(0))
        return h + m.counter

    result, before, after = compute(forward, torch.randn(3, 8))
    assert result.weights["counter"].dtype is FP32
    assert before.dtype is after.dtype is FP32


def test_merged_weights_are_merged_in_full_precision() -> None:
    result, before, after = compute(lambda m, x: x @ (m.linear.weight + 1e-4 * m.lower @ m.lower.T), torch.randn(3, 8))
    assert cosine(before, after) > 0.9999
    assert result.weights["lower"].dtype is FP32


def test_a_float_input_is_narrowed_only_where_it_meets_a_weight() -> None:
    """A timestep of 999.3 as input: its sine must not be that of 1000."""
    frequencies = torch.arange(4) / 2

    def forward(m: nn.Module, t: Tensor) -> Tensor:
        angle = t[:, :1] * frequencies
        return m.linear(torch.cat([angle.sin(), angle.cos()], -1))

    _, before, after = compute(forward, torch.tensor([[999.3, 0, 0, 0, 0, 0, 0, 0], [998.1, 0, 0, 0, 0, 0, 0, 0]]))
    assert cosine(before, after) > 0.9999


def test_text_form_and_errors() -> None:
    assert str(Pipeline.parse("cast{dtype=fp16}")) == "cast{dtype=fp16}"
    assert Cast.soundness is Soundness.BOUNDED
    with pytest.raises(PlanError, match=r"'bf8' is unknown; did you mean 'bf16'"):
        Cast("bf8")
    with pytest.raises(PlanError, match="cast"):
        Pipeline.parse("cast")


def test_report_holds_error_and_bound_and_operators_follow(program: Program, example: tuple[Tensor, Tensor]) -> None:
    plan = recast.plan(program, {"default": "int8", "compute_dtype": "bf16"}, cache=OperatorCache(None))
    result = recast.rewrite(program, plan, cache=OperatorCache(None))
    found = result.report.passes["cast{dtype=bf16}"]
    assert found["soundness"] == "bounded"
    assert 0 < found["output_error"] < found["bound"] < 1
    assert found["bound"] == pytest.approx(bounded_bound(program, BF16), rel=0.2)
    modules = [result.module.get_submodule(str(n.target)) for n in result.graph.find_nodes(op="call_module")]
    assert {m.operator.dtype for m in modules} == {BF16}
    assert cosine(result(*example)[0], program(*example)[0]) > 0.999


def test_a_model_without_matrices_is_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + 1

    program = recast.capture(Plain().eval(), (torch.randn(3, 4),))
    assert str(cast(program, "bf16")) == str(program)


# Real architectures.


def test_minilm(minilm: nn.Module) -> None:
    model = copy.copy(minilm)  # real weights, the first two layers
    model._modules = {**minilm._modules, "encoder": copy.copy(minilm.encoder)}
    model.encoder._modules = {"layer": minilm.encoder.layer[:2]}
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    program = recast.capture(model, (), {"input_ids": ids, "attention_mask": mask})
    result = cast(program, "bf16")
    before, after = program(input_ids=ids, attention_mask=mask), result(input_ids=ids, attention_mask=mask)
    assert type(before) is type(after)
    kept = mask.bool()
    assert cosine(before.last_hidden_state[kept], after.last_hidden_state[kept]) > 0.9998
    assert operand_dtypes(result, "linear") == {BF16}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_llama_at_far_positions(llama: tuple[Program, Tensor], dtype: str) -> None:
    """Beyond 256, bf16 cannot tell neighbouring positions apart: the rotation must be computed wider."""
    program, ids = llama
    result = cast(program, dtype)
    eps = float(torch.finfo({"bf16": BF16, "fp16": FP16}[dtype]).eps)
    before, after = program(input_ids=ids).logits, result(input_ids=ids).logits
    assert cosine(before[:, 300:], after[:, 300:]) > 1 - 20 * eps**2
    assert {FP32} == set(dtypes(result, "cos"))


@pytest.fixture(scope="module")
def llama() -> tuple[Program, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 330))
    return recast.capture(model, (), {"input_ids": ids[:, :7]}), ids


def test_gpt2() -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)).eval()
    ids = torch.randint(0, 64, (2, 9))
    program = recast.capture(model, (), {"input_ids": ids})
    result = cast(program, "bf16")
    assert cosine(program(input_ids=ids).last_hidden_state, result(input_ids=ids).last_hidden_state) > 0.9999


def test_vit() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = ViTModel(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    program = recast.capture(model, (pixels,))
    result = cast(program, "bf16")
    assert cosine(program(pixels).last_hidden_state, result(pixels).last_hidden_state) > 0.9999
    assert operand_dtypes(result, "conv2d") == {BF16}
