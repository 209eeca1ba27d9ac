"""The ONNX target: what it computes, for every form and for free sizes."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.lowering.onnx.integer import pairs_fit
from recast.passes.cache import OperatorCache
from recast.passes.forms import Form, Operator, Quantized, forms
from recast.patterns.errors import TargetError
from recast.patterns.program import Program
from tests.helpers import assert_close

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IN, OUT = 48, 24
COMPOSITES = [
    "low_rank(ratio=0.5) | int8",
    "int4(group=16) + low_rank(rank=4)",
    "low_rank(rank=3) + block_diagonal(3)",
    "block_diagonal(3) @ int4 @ block_diagonal(3)",
    "block_diagonal(3) | int8(activations=true)",
    "low_rank(6) | int4(symmetric=false)",
    "low_rank(8) | int8(activations=true)",
    "int4(group=10, symmetric=false)",
    "int8(activations=true, per_token=false)",
    "int8(activations=true, reduce_range=true)",
]


def rewritten(model: nn.Module, args: tuple[Any, ...], recipe: Any, **given: Any) -> Program:
    program = recast.capture(model.eval(), args, **given)
    return recast.rewrite(
        program, recast.plan(program, recipe), cache=OperatorCache(None), pictures=False, measure=False
    )


def no_grad(program: Program, *args: Any) -> Any:
    with torch.no_grad():
        return program(*args)


class Many(nn.Module):
    """One linear a form, of the same x."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(IN, OUT, bias=i % 2 == 0) for i in range(count)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"y{i}": linear(x) for i, linear in enumerate(self.each)}


def steps(operator: Operator, x: Tensor) -> float:
    """What one code more or less of a rounded activation may change in the result: rounding ties fall either way."""
    parts = [operator, *operator.children().values()]
    if not any(isinstance(part, Quantized) and part.activations for part in parts):
        return 0.0
    largest = float(operator.to_dense().abs().max())
    return float(x.amax() - x.amin()) / 255 * largest * max(1.0, largest) * 2


def test_every_form_computes_what_it_computes_in_eager() -> None:
    texts = [str(form) for cls in forms().values() for form in cls.examples((OUT, IN))] + COMPOSITES
    rules = {"rules": [{"match": f"each.{i}", "form": text} for i, text in enumerate(texts)], "allow_larger": True}
    program = rewritten(Many(len(texts)), (torch.randn(3, 5, IN),), rules)
    artifact = recast.lower(program, target="onnx")
    kernels = artifact.lowering.kernels(program)
    operators = {
        module.site: module.operator
        for n in program.graph.find_nodes(op="call_module")
        for module in [program.module.get_submodule(str(n.target))]
    }
    for shape in [(1, 1), (3, 17), (2, 5)]:
        x = torch.randn(*shape, IN)
        x[0, 0] = 0.0
        found, expected = artifact(x), no_grad(program, x)
        for i in range(len(texts)):
            gap = float((found[f"y{i}"] - expected[f"y{i}"]).abs().max())
            slack = steps(operators[f"each.{i}"], x) if f"each.{i}" in operators else 0.0
            if gap > slack:
                assert_close(found[f"y{i}"], expected[f"y{i}"], terms=4 * IN)
    chosen = dict(zip(texts, (kernels.get(f"each.{i}", "") for i in range(len(texts))), strict=True))
    assert chosen["int8"].startswith("DequantizeLinear")
    assert chosen["int4(group=16)"].startswith("MatMulNBits")
    assert chosen["int8(activations=true, per_token=false, reduce_range=true)"].endswith("(u8 x s8)")
    assert all(Form.parse(text) for text in texts)


def test_activations_are_rounded_once_for_all_products_of_the_same_x() -> None:
    program = rewritten(Many(3), (torch.randn(3, 5, IN),), "int8(activations=true, per_token=false, reduce_range=true)")
    model = recast.lower(program, target="onnx").lowering._model  # type: ignore[attr-defined]
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("DynamicQuantizeLinear") == 1
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert "Add" not in kinds  # biases are added by the products


def test_large_inputs_are_gathered_and_the_rest_multiplied_as_integers() -> None:
    model = nn.Linear(IN, OUT)
    x = torch.randn(4, 7, IN).clamp(-5, 5)
    x[..., 5] = 40.0
    program = recast.capture(model.eval(), (x,))
    calibration = recast.calibrate(program, [(x,)])
    decided = recast.plan(program, "llm_int8", calibration=calibration)
    after = recast.rewrite(program, decided, calibration=calibration, cache=OperatorCache(None), pictures=False)
    artifact = recast.lower(after, target="onnx")
    assert "MatMulIntegerToFloat" in next(iter(artifact.lowering.kernels(after).values()))
    found, expected = artifact(x), no_grad(after, x)
    # A code more or less of a rounded input at most; the large one is not rounded.
    assert float((found - expected).abs().max()) <= 10 / 255 * float(model.weight.detach().abs().max())
    assert float((found - no_grad(program, x)).norm()) < 0.02 * float((found - no_grad(program, 0 * x)).norm())


def test_codes_that_would_saturate_take_the_wide_kernel() -> None:
    fits = torch.tensor([[64, 64, -64, -64, 127, -128, 1]], dtype=torch.int8)
    assert pairs_fit(fits)
    assert not pairs_fit(torch.tensor([[65, 64]], dtype=torch.int8))
    assert pairs_fit(torch.tensor([[0, 65, 64, 0]], dtype=torch.int8))
    # Large codes of one sign and large activations: signed bytes would overflow 16 bits on x86 without VNNI.
    model = nn.Linear(256, 8, bias=False)
    nn.init.constant_(model.weight, 1.0)
    program = rewritten(model, (torch.ones(3, 256),), "int8(activations=true, per_token=false)")
    assert torch.allclose(recast.lower(program, target="onnx")(torch.ones(4, 256)), torch.full((4, 8), 256.0))


class Attention(nn.Module):
    """Packed weights, a mask with rows that see nothing, a flag, a dictionary in, several results out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 400, bias=False)
        self.out.weight = self.embed.weight
        self.norm = nn.LayerNorm(32)

    def forward(self, batch: dict[str, Tensor], double: bool = False) -> dict[str, Any]:
        h = self.embed(batch["ids"])
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        seen = batch["mask"][:, None, None, :] & batch["mask"][:, None, :, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        y = self.norm(y + h) * (2 if double else 1)
        return {"logits": self.out(y), "length": h.shape[1], "pair": (y, None)}


def example(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.rand(batch, length) > 0.4
    mask[0] = False
    return {"ids": torch.randint(0, 400, (batch, length)), "mask": mask}


def test_sizes_are_free_and_structures_are_kept() -> None:
    recipe = {"rules": [{"match": "qkv.q", "form": "int8"}, {"match": "qkv.v", "form": "low_rank(8)"}]}
    program = rewritten(Attention(), (example(2, 5), True), recipe)
    artifact = recast.lower(program, target="onnx")
    for batch, length in itertools.product((1, 3), (1, 3, 17)):
        inputs = example(batch, length)
        found, expected = artifact(inputs, True), no_grad(program, inputs, True)
        assert_close(found["logits"], expected["logits"], terms=64)
        assert_close(found["pair"][0], expected["pair"][0], terms=64)
        assert found["pair"][1] is None
        assert found["length"] == length
    graph = artifact.lowering._model.graph  # type: ignore[attr-defined]
    assert [list(map(str, value.shape)) for value in graph.inputs] == [["batch", "sequence"]] * 2
    # The tied weight is one initializer; those of rewritten sites are called after them.
    assert sum(400 in value.shape for value in graph.initializers.values()) == 1
    assert {"embed.weight", "qkv.0.values", "qkv.2.left.weight"} <= set(graph.initializers)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_a_mask(causal: bool) -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True, scale=0.3)

    program = recast.capture(Plain().eval(), (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    assert_close(recast.lower(program, target="onnx")(q, k), no_grad(program, q, k), terms=40)


def test_half_precision_runs_and_bfloat16_is_refused() -> None:
    half = recast.capture(nn.Linear(8, 4).half().eval(), (torch.randn(3, 8).half(),))
    x = torch.randn(3, 8).half()
    assert_close(recast.lower(half, target="onnx")(x), no_grad(half, x), terms=8)
    narrow = recast.capture(nn.Linear(8, 4).bfloat16().eval(), (torch.randn(3, 8).bfloat16(),))
    with pytest.raises(TargetError, match=r"bfloat16.*float32"):
        recast.lower(narrow, target="onnx")


def test_what_changes_as_it_runs_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x + self.seen

    program = recast.capture(Counter().eval(), (torch.randn(3),))
    with pytest.raises(TargetError, match="changes its weight 'seen'"):
        recast.lower(program, target="onnx")
