"""ONNX files as programs: weights by name, free sizes, what is left as it is, and files that are refused."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import recast
from recast.patterns.capture.onnx.graph import Graph, Node
from recast.patterns.capture.onnx.kept import _follows
from recast.patterns.capture.onnx.names import identifiers, weight_names
from recast.patterns.capture.onnx.program import kept_nodes
from recast.patterns.capture.onnx.read import read
from recast.patterns.errors import ModelError
from tests.helpers import assert_close
from tests.patterns.onnx_files import CONTRIB, by_onnxruntime, file_of, saved

F32, I64 = torch.float32, torch.int64
aten = torch.ops.aten


def node(
    kind: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", domain: str = "", **more: Any
) -> Any:
    return helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **more)


def dense(path: Path, *, opset: int = 21) -> Path:
    """Two products as tf2onnx writes them, and the shape arithmetic that comes with a reshape to heads."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "net/dense/MatMul/ReadVariableOp:0": torch.randn(16, 24, generator=generator),
        "net/dense/BiasAdd/ReadVariableOp:0": torch.randn(24, generator=generator),
        "net/out/MatMul/ReadVariableOp:0": torch.randn(24, 10, generator=generator),
    }
    kernel, bias, out = weights
    sizes = {"two": torch.tensor([2]), "first": torch.tensor(0), "second": torch.tensor(1), "rest": torch.tensor([-1])}
    axes = {"axes": [0]} if opset < 13 else {}
    zero = [] if opset < 13 else ["zero"]
    nodes = [
        node("MatMul", ["x:0", kernel], ["a"], "net/dense/MatMul"),
        node("Add", ["a", bias], ["b"], "net/dense/BiasAdd"),
        node("Relu", ["b"], ["c"], "net/dense/Relu"),
        node("Shape", ["x:0"], ["s"]),
        node("Gather", ["s", "first"], ["s0"]),
        node("Gather", ["s", "second"], ["s1"]),
        node("Unsqueeze", ["s0", *zero], ["u0"], **axes),
        node("Unsqueeze", ["s1", *zero], ["u1"], **axes),
        node("Concat", ["u0", "u1", "two", "rest"], ["shape"], axis=0),
        node("Reshape", ["c", "shape"], ["d"]),
        node("Transpose", ["d"], ["e"], perm=[0, 2, 1, 3]),
        node("Transpose", ["e"], ["f"], perm=[0, 2, 1, 3]),
        node("Concat", ["u0", "rest", "two_four"], ["back"], axis=0),
        node("Reshape", ["f", "back"], ["g"]),
        node("MatMul", ["g", out], ["y"], "net/out/MatMul"),
    ]
    sizes |= {"two_four": torch.tensor([24]), **({"zero": torch.tensor([0])} if zero else {})}
    given = {"x:0": (F32, ["batch", "words", 16])}
    return saved(file_of(nodes, given, ["y"], weights | sizes, opset=opset, contrib=False), path)


def test_products_written_by_hand_are_sites_under_the_names_of_their_modules(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx")
    program = recast.capture(path)
    assert [(site.name, site.weights) for site in recast.find(program, "linear")] == [
        ("net.dense", ("net.dense.weight",)),
        ("net.out", ("net.out.weight",)),
    ]
    assert recast.coverage(program).fraction == 1
    assert program.notes == []
    for shape in ((2, 7), (5, 3), (1, 1)):
        x = torch.randn(*shape, 16)
        assert_close(program(x_0=x)["y"], by_onnxruntime(path, {"x:0": x})["y"], terms=24)


def test_sizes_leave_no_trace_in_the_graph(tmp_path: Path) -> None:
    program = recast.capture(dense(tmp_path / "dense.onnx"))
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert not targets & {aten.cat.default, aten.index_select.default, aten.index.Tensor, aten.full.default}
    assert [type(size) for size in program.inputs()[0].meta["val"].shape[:2]] == [torch.SymInt] * 2


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 17, 20])
def test_older_opsets(opset: int, tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx", opset=opset)
    x = torch.randn(3, 4, 16)
    assert_close(recast.capture(path)(x)["y"], by_onnxruntime(path, {"x:0": x})["y"], terms=24)


def test_a_path_may_come_with_its_example(tmp_path: Path) -> None:
    program = recast.capture(str(dense(tmp_path / "dense.onnx")), (torch.randn(2, 4, 16),))
    assert program(torch.randn(3, 9, 16))["y"].shape == (3, 9, 10)
    artifact = recast.optimize(dense(tmp_path / "dense.onnx"), recipe="low_rank(rank=4)", target="eager")
    assert [row.name for row in artifact.report.rows] == ["net.dense", "net.out"]


# -- names -----------------------------------------------------------------------------------------


def named(nodes: list[Node], *weights: str) -> list[str]:
    held = {name: torch.empty(2, 2) for name in weights}
    return list(weight_names(Graph([], [], nodes, held), held).values())


def product(weight: str, scope: str = "", output: str = "y") -> Node:
    return Node("", "MatMul", 21, ("x", weight), (output,), scope=scope)


def test_a_weight_without_a_name_has_that_of_its_module() -> None:
    assert named([product("onnx::MatMul_531", "encoder.layer.0.query")], "onnx::MatMul_531") == [
        "encoder.layer.0.query.weight"
    ]
    turned = Node("", "Transpose", 21, ("val_7",), ("t",))
    assert named([turned, product("t", "head")], "val_7") == ["head.weight"]
    add = Node("", "Add", 21, ("y", "layer.0.up.bias"), ("z",))
    assert named([product("val_7"), add], "val_7", "layer.0.up.bias") == ["layer.0.up.weight", "layer.0.up.bias"]
    packed = Node(
        CONTRIB, "Attention", 1, ("x", "Attention_0_qkv_weight", "Attention_0_qkv_bias"), ("y",), scope="layer.0.self"
    )
    assert named([packed], "Attention_0_qkv_weight") == ["layer.0.self.qkv.weight"]


def test_names_do_not_clash_with_each_other_or_with_what_modules_have() -> None:
    assert named([], "a.b", "a.b.c", "a", "a/b") == ["a.b", "a.b_c", "a_2", "a.b_2"]
    assert named([], "net.type.half") == ["net.type_.half_"]
    assert named([], "::", "7") == ["constant", "7"]
    assert identifiers(["x:0", "x_0", "onnx::Gather_0", "3"]) == {
        "x:0": "x_0", "x_0": "x_0_", "onnx::Gather_0": "onnx_Gather_0", "3": "input_3",
    }  # fmt: skip


# -- what is left as it is -------------------------------------------------------------------------


def with_unknown(path: Path) -> Path:
    """A product, an operator of onnxruntime and one of the standard that have no function here, and another product."""
    held = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 6)}
    nodes = [
        node("MatMul", ["x", "a.weight"], ["p"]),
        node("Shrink", ["p"], ["q"], lambd=0.3, bias=0.1),
        node("MatMul", ["q", "b.weight"], ["r"]),
        node("Inverse", ["square"], ["inverse"], domain=CONTRIB),
    ]
    given = {"x": (F32, ["batch", "words", 8]), "square": (F32, ["batch", 3, 3])}
    return saved(file_of(nodes, given, ["r", "inverse"], held), path)


def inputs_with_unknown(batch: int, words: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, words, 8), "square": torch.eye(3) * 2 + torch.rand(batch, 3, 3) / 4}


def test_unknown_operators_run_are_listed_and_written_again(tmp_path: Path) -> None:
    path = with_unknown(tmp_path / "unknown.onnx")
    program = recast.capture(path)
    assert [(operator, reason) for _, operator, reason in kept_nodes(program)] == [
        ("Shrink", "an operator unknown here"),
        (f"{CONTRIB}::Inverse", "an operator unknown here"),
    ]
    assert len(program.notes) == 2
    assert [m.kind for m in recast.coverage(program).misses] == ["kept", "kept"]
    assert recast.coverage(program).fraction == 1
    artifacts = {target: recast.optimize(program, recipe="dense", target=target) for target in ("eager", "onnx")}
    for target, artifact in artifacts.items():
        artifact.save(tmp_path / target)
    runs = [program, *artifacts.values(), *(recast.load(tmp_path / target) for target in artifacts)]
    for shape in ((2, 5), (3, 4)):
        given = inputs_with_unknown(*shape)
        wanted = by_onnxruntime(path, given)
        for run in runs:
            found = run(**given)
            for name in ("r", "inverse"):
                assert_close(found[name], wanted[name], terms=64)
    written = [n.op_type for n in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node]
    assert {"Shrink", "Inverse"} <= set(written)


def nbits(path: Path) -> Path:
    """A product with four-bit weights, one with bytes that are unpacked, and a dense one."""
    generator = torch.Generator().manual_seed(0)
    held = {
        "up.codes": torch.randint(0, 256, (24, 1, 16), generator=generator).to(torch.uint8),
        "up.scale": torch.rand(24, generator=generator),
        "down.codes": torch.randint(-100, 100, (24, 16), generator=generator).to(torch.int8),
        "down.scale": torch.rand(16, generator=generator) / 50,
        "head.weight": torch.randn(16, 8, generator=generator),
    }
    nodes = [
        node("MatMulNBits", ["x", "up.codes", "up.scale"], ["u"], domain=CONTRIB, K=32, N=24, bits=4, block_size=32),
        node("DequantizeLinear", ["down.codes", "down.scale"], ["w"], axis=1),
        node("MatMul", ["u", "w"], ["d"]),
        node("MatMul", ["d", "head.weight"], ["y"]),
    ]
    return saved(file_of(nodes, {"x": (F32, ["batch", "words", 32])}, ["y"], held), path)


def test_matrices_that_are_quantized_already_are_left_alone_with_the_reason(tmp_path: Path) -> None:
    path = nbits(tmp_path / "nbits.onnx")
    program = recast.capture(path)
    assert [site.name for site in recast.find(program, "linear")] == ["head"]
    reasons = {m.name: m.reason for m in recast.coverage(program).misses}
    assert reasons["up.codes"] == f"the ONNX operator {CONTRIB}::MatMulNBits is left as it is: quantized already"
    assert reasons["down.codes"] == "the ONNX operator DequantizeLinear is left as it is: quantized already"
    assert reasons["matmul"] == "its matrix comes from DequantizeLinear: quantized already"
    assert recast.coverage(program).fraction == 1
    artifact = recast.optimize(program, recipe="int8", target="onnx")
    assert [row.name for row in artifact.report.rows] == ["head"]
    for shape in ((2, 5), (1, 3)):
        x = torch.randn(*shape, 32)
        wanted = by_onnxruntime(path, {"x": x})["y"]
        assert_close(program(x)["y"], wanted, terms=64)
        found = artifact(x)["y"]
        assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(
    ("sizes", "shapes", "said"),
    [
        ([3, 3], [[[2, 5]], [[4, 7]]], 3),
        ([5, 7], [[[2, 5], [5, 1]], [[4, 7], [7, 1]]], "0.1"),
        ([2, 4], [[None, [2, 5]], [None, [4, 7]]], "1.0"),
        ([10, 14], [[[2, 5]], [[4, 7]]], "0.1*2"),
        ([2, 3], [[[1, 4]], [[1, 6]]], "0.1/2"),
        ([3, 9], [[[2, 5]], [[4, 7]]], "?"),
        ([5], [[[2, 5]]], "0.1"),
        ([6], [[[2, 5]]], 6),
    ],
)
def test_how_sizes_follow_is_seen(sizes: list[int], shapes: list[list[Any]], said: int | str) -> None:
    assert _follows(sizes, 1, shapes) == said


# -- files -----------------------------------------------------------------------------------------


def external(folder: Path, location: str = "weights.bin", **entries: int) -> Path:
    """A product whose weight lies in another file, at an offset."""
    folder.mkdir(exist_ok=True)
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    (folder / "weights.bin").write_bytes(b"\0" * 64 + weight.tobytes())
    model = file_of(
        [node("MatMul", ["x", "layer.weight"], ["y"])], {"x": (F32, ["batch", 4])}, ["y"], {}, contrib=False
    )
    held = TensorProto(
        name="layer.weight", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": location, "offset": 64, "length": 48, **entries}.items():
        held.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(held)
    return saved(model, folder / "model.onnx")


def test_weights_beside_the_model_are_mapped_and_never_written_to(tmp_path: Path) -> None:
    path = external(tmp_path)
    before = (tmp_path / "weights.bin").read_bytes()
    program = recast.capture(path)
    assert torch.equal(program(torch.eye(4))["y"], torch.arange(12.0).reshape(4, 3))
    with torch.no_grad():
        program.weights["layer.weight"].zero_()
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_links_are_followed_to_where_the_model_lies_and_no_further(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    external(blobs)
    snapshot.mkdir()
    for name in ("model.onnx", "weights.bin"):
        (snapshot / name).symlink_to(blobs / name)
    assert read(snapshot / "model.onnx").constants["layer.weight"].shape == (4, 3)
    lonely = external(tmp_path / "lonely")
    (tmp_path / "lonely" / "weights.bin").unlink()
    (tmp_path / "lonely" / "weights.bin").symlink_to(blobs / "weights.bin")
    with pytest.raises(ModelError, match="outside the model's folder"):
        read(lonely)


@pytest.mark.parametrize(
    ("location", "entries", "said"),
    [
        ("../weights.bin", {}, "outside the model's folder"),
        ("/etc/passwd", {}, "outside the model's folder"),
        ("C:\\weights.bin", {}, "outside the model's folder"),
        ("..\\weights.bin", {}, "outside the model's folder"),
        ("", {}, "outside the model's folder"),
        ("other.bin", {}, "which is not there"),
        ("weights.bin", {"offset": 72}, "cut short: it has 112 bytes, 120 are needed"),
        ("weights.bin", {"length": 40}, "12 values of float32 take 48"),
        ("weights.bin", {"offset": -8}, "cut short"),
    ],
)
def test_weights_elsewhere_or_damaged_are_refused(
    location: str, entries: dict[str, int], said: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 200)
    path = external(tmp_path / "inner", location, **entries)
    with pytest.raises(ModelError, match=said):
        read(path)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    whole = dense(tmp_path / "dense.onnx").read_bytes()
    bad = tmp_path / "bad.onnx"
    for content, said in [
        (b"", "not an ONNX model"),
        (b"PK\x03\x04" + b"\0" * 99, "not an ONNX model"),
        (whole[:-20], "not an ONNX model|damaged|nothing"),
        (whole[: len(whole) // 2], "not an ONNX model|damaged|nothing"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            read(bad)
    with pytest.raises(ModelError, match="there is no file"):
        read(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"no \.onnx file"):
        recast.capture(tmp_path / "model.pt")


def changed(path: Path, change: Any) -> Path:
    model = onnx.load(path)
    change(model)
    return saved(model, path.with_name("changed.onnx"))


def test_graphs_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx")

    def version(number: int) -> Any:
        return lambda m: setattr(m.opset_import[0], "version", number)

    def sequence(m: onnx.ModelProto) -> None:
        m.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x:0", 1, None))

    for change, said in [
        (version(6), "opset 6, which is too old"),
        (version(99), "opset 99; onnx .* knows those up to"),
        (lambda m: m.graph.node.pop(3), "reads 's', which nothing before it makes"),
        (lambda m: setattr(m.graph.output[0], "name", "z"), "gives 'z', which nothing in it makes"),
        (sequence, "is sequence, not a tensor"),
        (lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "has no shape"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", b"\0" * 10), "is damaged"),
        (
            lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING),
            "is STRING, which torch does not hold",
        ),
        (
            lambda m: setattr(m.graph.node[0], "domain", "not.declared"),
            "without saying which version of 'not.declared'",
        ),
    ]:
        with pytest.raises(ModelError, match=said):
            read(changed(path, change))


def test_a_custom_operator_is_named_where_nothing_can_run_it(tmp_path: Path) -> None:
    model = file_of([node("Fancy", ["x"], ["y"], domain="my.ops")], {"x": (F32, [2, 3])}, ["y"], {}, contrib=False)
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    with pytest.raises(recast.RecastError, match=r"does not know my.ops::Fancy"):
        recast.capture(saved(model, tmp_path / "fancy.onnx"))


def test_half_types_are_read_bit_for_bit(tmp_path: Path) -> None:
    values = torch.randn(4, 4)
    for dtype, element in ((torch.bfloat16, TensorProto.BFLOAT16), (torch.float16, TensorProto.FLOAT16)):
        raw = values.to(dtype).view(torch.int16).numpy().tobytes()
        held = TensorProto(name="w.weight", data_type=element, dims=[4, 4], raw_data=raw)
        model = file_of([node("Cast", ["w.weight"], ["y"], to=1)], {"x": (F32, [1])}, ["y"], {}, contrib=False)
        model.graph.initializer.append(held)
        found = read(saved(model, tmp_path / "half.onnx")).constants["w.weight"]
        assert found.dtype == dtype
        assert torch.equal(found, values.to(dtype))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows memory as Linux does")
def test_weights_in_a_file_of_their_own_take_no_memory_of_their_own(tmp_path: Path) -> None:
    held = read(external(tmp_path)).constants["layer.weight"]
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= held.data_ptr() < int(last, 16):
            assert line.endswith(os.fspath(tmp_path / "weights.bin"))
            return
    raise AssertionError("the weight lies in no mapping")
