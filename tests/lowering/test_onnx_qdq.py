"""The ONNX target's style for other runtimes: QuantizeLinear, DequantizeLinear and standard operators."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.patterns.errors import TargetError
from recast.patterns.program import Program
from tests.helpers import assert_close

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STATIC = "int8(activations=true, static=true)"
NARROW = "int8(activations=true, static=true, reduce_range=true)"


class Block(nn.Module):
    """Three products of one x, a mask, an activation function, a head that shares the embedding's matrix; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(63, 24)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.up, self.down = nn.Linear(24, 60), nn.Linear(60, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 63, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        seen = mask[:, None, :].bool()
        x = x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=seen)
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def example(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return torch.randint(0, 63, (batch, length)), mask


def rewritten(recipe: Any, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    program = recast.capture(Block().eval(), example(3, 7))
    statistics = recast.calibrate(program, [example(4, 9), example(2, 5)])
    return recast.rewrite(
        program, recast.plan(program, recipe, statistics), calibration=statistics, pictures=False, measure=False
    )


def agree(program: Program, run: Any, shapes: list[tuple[int, int]]) -> None:
    for shape in shapes:
        given = example(*shape)
        with torch.no_grad():
            expected = program(*given)
        found = run(*given)
        gap = (found - expected).abs()
        # Inputs of later products may fall to the other side of a threshold: few values, by a step of a grid.
        assert float((gap > 1e-4 * expected.abs().max()).double().mean()) < 0.02
        assert float(gap.max()) < 0.05 * float(expected.abs().max())


def kinds(artifact: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in artifact.lowering._model.graph)


def test_numbers_sizes_and_operators(tmp_path: Path) -> None:
    program = rewritten(NARROW)
    artifact = recast.lower(program, "onnx", style="qdq")
    artifact.save(tmp_path / "saved")
    shapes = [(1, 1), (2, 5), (3, 60), (5, 7)]
    agree(program, artifact, shapes)
    agree(program, recast.load(tmp_path / "saved"), shapes)

    proto = onnx.load(tmp_path / "saved" / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    found = kinds(artifact)
    sites = len(artifact.lowering.kernels(program))
    # One rounding for the three products of one x; of a weight's scales one for each output channel.
    assert found["QuantizeLinear"] == sites - 2
    assert found["DequantizeLinear"] == sites - 2 + sites
    held = {value.name: value for value in proto.graph.initializer}
    assert held["up.values"].data_type == onnx.TensorProto.INT8
    assert list(held["up.scale"].dims) == [60]
    assert held["up.input_zero"].data_type == onnx.TensorProto.UINT8
    axes = [a.i for n in proto.graph.node if "up.values" in n.input for a in n.attribute if a.name == "axis"]
    assert axes == [1]


def test_a_tied_head_keeps_the_table_of_the_embedding() -> None:
    rules = {"rules": [{"match": "embed", "form": NARROW}], "default": NARROW}
    program = rewritten(rules)
    agree(program, recast.lower(program, "onnx", style="qdq"), [(2, 5), (1, 9)])


FORMS = [
    STATIC,  # codes whose pairs do not fit 16 bits
    "int8(activations=true, static=true, zero_point=false)",
    "int8(activations=true, static=true, symmetric=false)",
    "int8(activations=true, static=true, group=16)",
    "int8",
    "int4(group=8)",
    f"smoothquant(base='{NARROW}')",
    f"low_rank(6) | {NARROW}",
]


class Many(nn.Module):
    """One linear a form, of the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(48, 24, bias=i % 2 == 0) for i in range(len(FORMS))])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.each]


@pytest.mark.parametrize("style", ["qdq", "qoperator"])
def test_every_form_computes_what_it_does_in_eager(style: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 48)
    program = recast.capture(Many().eval(), (x,))
    statistics = recast.calibrate(program, [x])
    rules = {"rules": [{"match": f"each.{i}", "form": f} for i, f in enumerate(FORMS)], "allow_larger": True}
    after = recast.rewrite(
        program, recast.plan(program, rules, statistics), calibration=statistics, pictures=False, measure=False
    )
    artifact: Any = recast.lower(after, "onnx", style=style)
    for shape in [(1, 1), (2, 63)]:
        given = torch.randn(*shape, 48)
        with torch.no_grad():
            expected = after(given)
        for a, b, form in zip(artifact(given), expected, FORMS, strict=True):
            if "smoothquant" in form or "|" in form:  # a rounded product before the grid: a code may fall either way
                assert float((a - b).abs().max()) < 0.02 * float(b.abs().max()), form
            else:
                assert_close(a, b, terms=48)
    if style == "qdq":
        assert {node.domain for node in artifact.lowering._model.graph} <= {"", "ai.onnx"}
        zero = artifact.lowering._model.graph.initializers["each.1.input_zero"].const_value.numpy()
        assert zero.dtype == "int8"  # as TensorRT takes it
        assert not zero.any()


class Direct(nn.Module):
    """Attention that reads three products as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def test_operands_of_an_attention_are_told_apart() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16)
    program = recast.capture(Direct().eval(), (x,))
    after = recast.rewrite(program, recast.plan(program, "int8"), pictures=False, measure=False)
    with torch.no_grad():
        assert_close(recast.lower(after, "onnx")(x), after(x), terms=64)


def test_ranges_found_as_they_come_are_refused() -> None:
    program = recast.capture(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16)).eval(), (torch.randn(3, 16),))
    after = recast.rewrite(program, recast.plan(program, "int8(activations=true)"), pictures=False, measure=False)
    with pytest.raises(TargetError, match=r"'0' \(int8\(activations=true\)\) and 1 more.*static=true"):
        recast.lower(after, "onnx", style="qdq")


@pytest.mark.parametrize(
    "options", [{"style": "qd"}, {"style": "qdq", "accuracy_level": 4}, {"style": "qdq", "attention": "grouped"}]
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="style"):
        recast.lower(recast.capture(nn.Linear(3, 2).eval(), (torch.randn(1, 3),)), "onnx", **options)


def test_openvino_multiplies_integers(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    program = rewritten(NARROW)
    recast.lower(program, "onnx", style="qdq").save(tmp_path / "saved")
    compiled = openvino.Core().compile_model(
        tmp_path / "saved" / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(*given: Tensor) -> Tensor:
        return torch.from_numpy(compiled([tensor.numpy() for tensor in given])[0].copy())

    agree(program, run, [(2, 5), (3, 17)])
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [f["runtimePrecision"].value for f in facts if f["layerType"].value == "FullyConnected"]
    assert kinds.count("u8") == 5
