"""A model that others' tools wrote becomes the file that recast writes from the torch model: its operators, and its numbers."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import recast
from recast.lowering.artifact import Artifact
from tests.helpers import assert_close
from tests.lowering.test_onnx_in import TEXT, WRITERS, bert, text
from tests.patterns.onnx_files import by_onnxruntime, exported, file_of, saved

HEADS, FEATURES = 4, 8
# What a call spends its time with; the rest makes masks and positions, once for all layers.
HEAVY = {
    "MatMul", "FusedMatMul", "MatMulIntegerToFloat", "QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear", "MatMulNBits",
    "LayerNormalization", "ReduceMean", "Sqrt", "Pow", "Div", "Softmax", "IsNaN", "Gelu", "Erf", "Tanh", "Transpose", "Clip",
}  # fmt: skip


class Graph:
    """Nodes of an ONNX graph in their order."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.nodes: list[Any] = []
        self.constants = constants

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        result = f"{kind}_{len(self.nodes)}:0"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [result], name=f"{kind}_{len(self.nodes)}", **attributes)
        )
        return result

    def constant(self, value: Any) -> str:
        name = f"const_{len(self.constants)}:0"
        self.constants[name] = torch.as_tensor(value)
        return name

    def weight(self, name: str, value: Tensor) -> str:
        self.constants[f"{name}:0"] = value.detach().contiguous()
        return f"{name}:0"


def from_tensorflow(model: nn.Module, path: Path) -> Path:
    """BERT as tf2onnx writes it: MatMul and Add, norms folded, GELU and attention in steps, -10000 where a mask is zero."""
    graph = Graph({})
    held: Any = model
    add, constant = graph.add, graph.constant

    def dense(x: str, module: Any, name: str) -> str:
        y = add("MatMul", x, graph.weight(f"bert/{name}/MatMul/ReadVariableOp", module.weight.T))
        return add("Add", y, graph.weight(f"bert/{name}/BiasAdd/ReadVariableOp", module.bias))

    def norm(x: str, module: Any, name: str) -> str:
        mean = add("ReduceMean", x, axes=[-1], keepdims=1)
        apart = add("Sub", x, mean)
        square = add("ReduceMean", add("Mul", apart, apart), axes=[-1], keepdims=1)
        root = add("Sqrt", add("Add", square, constant(torch.tensor(module.eps))))
        scale = add("Mul", add("Reciprocal", root), graph.weight(f"bert/{name}/gamma", module.weight))
        moved = add("Sub", graph.weight(f"bert/{name}/beta", module.bias), add("Mul", mean, scale))
        return add("Add", add("Mul", x, scale), moved)

    def reshaped(x: str, *sizes: int) -> str:
        last = [constant([size]) for size in sizes]
        return add("Reshape", x, add("Concat", *lengths, *last, axis=0))

    def table(name: str, ids: str) -> str:
        return add("Gather", graph.weight(f"bert/embeddings/{name}", getattr(held.embeddings, name).weight), ids)

    shape = add("Shape", "input_ids")
    numbers = [add("Gather", shape, constant(i)) for i in (0, 1)]
    lengths = [add("Unsqueeze", number, constant([0])) for number in numbers]
    positions = add("Unsqueeze", add("Range", constant(0), numbers[1], constant(1)), constant([0]))
    words = add("Add", table("word_embeddings", "input_ids"), table("position_embeddings", positions))
    x = norm(
        add("Add", words, table("token_type_embeddings", "token_type_ids")), held.embeddings.LayerNorm, "embeddings"
    )
    seen = add("Cast", add("Unsqueeze", "attention_mask", constant([1, 2])), to=1)
    mask = add("Mul", add("Sub", constant(1.0), seen), constant(-10000.0))
    for number, layer in enumerate(held.encoder.layer):
        name, own = f"encoder/layer_._{number}", layer.attention
        heads = {
            role: reshaped(dense(x, getattr(own.self, role), f"{name}/attention/self/{role}"), HEADS, FEATURES)
            for role in ("query", "key", "value")
        }
        query, value = (add("Transpose", heads[role], perm=[0, 2, 1, 3]) for role in ("query", "value"))
        scores = add("MatMul", query, add("Transpose", heads["key"], perm=[0, 2, 3, 1]))
        scores = add("Add", add("Div", scores, constant(FEATURES**0.5)), mask)
        y = add("MatMul", add("Softmax", scores, axis=-1), value)
        y = reshaped(add("Transpose", y, perm=[0, 2, 1, 3]), HEADS * FEATURES)
        y = dense(y, own.output.dense, f"{name}/attention/output/dense")
        x = norm(add("Add", y, x), own.output.LayerNorm, f"{name}/attention/output/LayerNorm")
        y = dense(x, layer.intermediate.dense, f"{name}/intermediate/dense")
        bent = add("Add", add("Erf", add("Div", y, constant(2**0.5))), constant(1.0))
        y = dense(add("Mul", add("Mul", y, constant(0.5)), bent), layer.output.dense, f"{name}/output/dense")
        x = norm(add("Add", y, x), layer.output.LayerNorm, f"{name}/output/LayerNorm")
    graph.nodes.append(helper.make_node("Identity", [x], ["hidden"]))
    inputs: dict[str, tuple[torch.dtype, Sequence[int | str]]] = {
        name: (torch.int64, ["batch", "words"]) for name in TEXT
    }
    return saved(file_of(graph.nodes, inputs, ["hidden"], graph.constants, opset=15, contrib=False), path)


def heavy(artifact: Artifact) -> collections.Counter[str]:
    graph = artifact.lowering._model.graph  # type: ignore[attr-defined]
    return collections.Counter(node.op_type for node in graph if node.op_type in HEAVY)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    spelled = bert()
    spelled.set_attn_implementation("eager")  # type: ignore[operator]
    return {
        "dynamo": exported(bert(), text(2, 9), folder / "dynamo.onnx", **WRITERS["dynamo"]),
        "script14": exported(spelled, text(2, 9), folder / "script14.onnx", **WRITERS["script14"]),
        "tensorflow": from_tensorflow(bert(), folder / "tensorflow.onnx"),
    }


RECIPES = ["dense", "int8", "int8(activations=true)"]


@pytest.fixture(scope="module")
def of_torch() -> dict[str, Artifact]:
    program = recast.capture(bert(), (), text(2, 9))
    return {recipe: recast.optimize(program, recipe=recipe, target="onnx", verification=False) for recipe in RECIPES}


@pytest.mark.parametrize("writer", ["dynamo", "script14", "tensorflow"])
def test_the_file_is_that_of_the_torch_model(
    writer: str, files: dict[str, Path], of_torch: dict[str, Artifact]
) -> None:
    program = recast.capture(files[writer])
    assert program.notes == []
    for recipe in RECIPES:
        found = recast.optimize(program, recipe=recipe, target="onnx", verification=False)
        assert heavy(found) == heavy(of_torch[recipe])
        for shape in ((2, 9), (3, 5), (1, 12)):
            inputs = text(*shape)
            wanted = of_torch[recipe](**inputs).last_hidden_state
            assert_close(found(**inputs)["hidden"], wanted, terms=64, factor=16)


def test_what_tensorflow_spells_out_is_recognised(files: dict[str, Path]) -> None:
    program = recast.capture(files["tensorflow"])
    inputs = text(2, 7)
    assert_close(
        program(**inputs)["hidden"], by_onnxruntime(files["tensorflow"], inputs)["hidden"], terms=64, factor=16
    )
    kinds = collections.Counter(site.kind for site in recast.coverage(program).sites)
    assert (kinds["attention"], kinds["norm"], kinds["mlp"], kinds["linear"]) == (1, 3, 1, 6)


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("order", ["half first", "half last", "half inside", "a quarter"])
def test_gelu_in_steps_is_one_node_only_if_it_is_gelu(kind: str, order: str) -> None:
    class Spelled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bent = torch.erf(x / 2**0.5) if kind == "none" else torch.tanh(0.7978845608 * (x + 0.044715 * x**3))
            if order == "half first":
                return (0.5 * x) * (bent + 1.0)
            if order == "half inside":
                return x * ((1.0 + bent) * 0.5)
            return x * (1.0 + bent) * (0.5 if order == "half last" else 0.25)

    x = torch.randn(5, 16)
    model = Spelled().eval()
    artifact = recast.lower(recast.capture(model, (x,)), target="onnx")
    kinds = {node.op_type for node in artifact.lowering._model.graph}  # type: ignore[attr-defined]
    assert ("Gelu" in kinds) == (order != "a quarter")
    assert_close(artifact(x), model(x.double()), terms=8)
