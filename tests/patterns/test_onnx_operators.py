"""Each ONNX operator that has a function here gives what onnxruntime gives; what has none, or not for this use, stays."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import helper

from recast.patterns.capture.onnx.module import OnnxModule
from recast.patterns.capture.onnx.operator import operators
from recast.patterns.capture.onnx.read import read
from tests.helpers import assert_close
from tests.patterns.onnx_files import CONTRIB, by_onnxruntime, file_of, saved

F32, I64, I32, BOOL = torch.float32, torch.int64, torch.int32, torch.bool
FREE = torch.Generator().manual_seed(0)


@dataclasses.dataclass
class Case:
    """A node, what it is given and the constants it reads."""

    type: str
    inputs: Sequence[Tensor | str]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    constants: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    domain: str = ""
    results: int = 1
    opset: int = 21
    terms: int = 64
    read: Sequence[int] = (0,)  # results that are compared
    stays: bool = False

    def __str__(self) -> str:
        given = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.type}-{self.opset}-{given}-{len(self.inputs)}".replace(" ", "")


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=FREE)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=FREE)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=I64)


def unary(*types: str, of: Callable[[Tensor], Tensor] = lambda x: x) -> list[Case]:
    return [Case(t, [of(rand(3, 5))], terms=1) for t in types]


def binary(*types: str, of: Callable[[Tensor], Tensor] = lambda x: x) -> list[Case]:
    return [Case(t, [of(rand(3, 1, 5)), of(rand(4, 1))], terms=1) for t in types]


X = rand(2, 3, 8)
IMAGE = rand(2, 4, 9, 7)
HALF = torch.tensor(0.5)
Q, K, V = rand(2, 6, 16), rand(2, 9, 16), rand(2, 9, 16)
SEEN = torch.tensor([[1] * 9, [1] * 4 + [0] * 5], dtype=I32)
NORM = {"w": rand(8), "b": rand(8)}

CASES = [
    *unary("Exp", "Erf", "Tanh", "Sigmoid", "Sin", "Cos", "Neg", "Abs", "Floor", "Ceil", "Round", "Sign", "Relu"),
    *unary("Softplus", "Softsign", "HardSwish", "Mish", "Elu", "Selu", "LeakyRelu", "Celu", "HardSigmoid", "Identity"),
    *unary("Gelu", "ThresholdedRelu"),
    *unary("Sqrt", "Log", "Reciprocal", of=lambda x: x.abs() + 0.5),
    *unary("Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", of=torch.tanh),
    *unary("IsNaN", "IsInf", of=lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, torch.nan, x))),
    *binary("Add", "Sub", "Mul", "Div", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Max", "Min", "Sum", "Mean"),
    *binary("And", "Or", "Xor", of=lambda x: x > 0),
    *binary("Div", "Mod", "Equal", of=lambda x: (x * 5).long().abs() + 1),
    Case("Div", [whole(-7, 7, -1), whole(2, -2, 3)], terms=1),
    Case("Mod", [whole(-7, 7, -1), whole(2, -2, 3)], terms=1),
    Case("Mod", [rand(6) * 4, rand(6) + 3], {"fmod": 1}, terms=1),
    Case("Not", [rand(4) > 0]),
    Case("Pow", [rand(3, 4).abs(), "two"], constants={"two": torch.tensor(2.0)}),
    Case("Pow", [rand(3, 4).abs(), rand(4)]),
    Case("Pow", [rand(3, 4).abs(), "three"], constants={"three": torch.tensor(3, dtype=I64)}),
    Case("Sub", ["one", X], constants={"one": torch.tensor(1.0)}),
    Case("Div", ["one", X.abs() + 1], constants={"one": torch.tensor([1.0])}),
    Case("Mul", [rand(), "one"], constants={"one": torch.tensor([3.0])}, terms=1),
    Case("Where", [X > 0, X, "low"], constants={"low": torch.tensor(-1e30)}, terms=1),
    Case("Where", [X > 0, "zero", "low"], constants={"zero": torch.tensor([0.0]), "low": torch.tensor([-1e30])}, terms=1),
    Case("Where", [X > 0, "a", "b"], constants={"a": whole(3), "b": whole(4, 5, 6, 7, 8, 9, 10, 11)}, terms=1),
    Case("Clip", [X, "low", "high"], constants={"low": -HALF, "high": HALF}),
    Case("Clip", [X, "low"], constants={"low": -HALF}),
    Case("Clip", [X], {"min": -0.5, "max": 0.25}, opset=10),
    Case("Cast", [X * 4], {"to": 7}),
    Case("Cast", [ints(2, 3, 4)], {"to": 9}),
    Case("CastLike", [X * 4, ints(3, 1)]),
    Case("PRelu", [X, "slope"], constants={"slope": rand(3, 1)}),
    Case("QuickGelu", [X], {"alpha": 1.5}, domain=CONTRIB),
    Case("Gelu", [X], domain=CONTRIB),
    Case("Gelu", [X], {"approximate": "tanh"}),
    Case("BiasGelu", [X, "b"], constants=NORM, domain=CONTRIB),
    Case("FastGelu", [X], domain=CONTRIB),
    Case("FastGelu", [X, "b"], constants=NORM, domain=CONTRIB),
    Case("Softmax", [X], {"axis": 1}),
    Case("Softmax", [X]),
    Case("Softmax", [X], {"axis": 1}, opset=11),
    Case("Softmax", [X], opset=11),
    Case("LogSoftmax", [X], {"axis": -1}),
    Case("LpNormalization", [X], {"axis": -1, "p": 2}),
    # shapes
    Case("Shape", [X], {"start": 1}),
    Case("Shape", [X], {"start": -2, "end": -1}),
    Case("Size", [X]),
    Case("Reshape", [X, "s"], constants={"s": whole(0, -1)}),
    Case("Reshape", [X, "s"], constants={"s": whole(4, -1, 4)}),
    Case("Flatten", [IMAGE]),
    Case("Flatten", [IMAGE], {"axis": 0}),
    Case("Flatten", [IMAGE], {"axis": 4}),
    Case("Flatten", [IMAGE], {"axis": -1}),
    Case("Squeeze", [rand(1, 3, 1), "a"], constants={"a": whole(-1)}),
    Case("Squeeze", [rand(1, 3, 1)]),
    Case("Squeeze", [rand(1, 3, 1)], {"axes": [0]}, opset=11),
    Case("Unsqueeze", [X, "a"], constants={"a": whole(0, -1)}),
    Case("Unsqueeze", [X], {"axes": [1]}, opset=11),
    Case("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    Case("Transpose", [X], {"perm": [0, 2, 1]}),
    Case("Transpose", [X]),
    Case("Expand", [rand(3, 1), "s"], constants={"s": whole(2, 1, 5)}),
    Case("Expand", [rand(3, 4), "s"], constants={"s": whole(1)}),
    Case("Tile", [X, "s"], constants={"s": whole(1, 2, 3)}),
    Case("Concat", [X, rand(2, 1, 8)], {"axis": 1}),
    Case("Split", [X], {"axis": -1, "num_outputs": 3}, results=3, read=(0, 1, 2)),
    Case("Split", [X, "s"], {"axis": -1}, {"s": whole(5, 3)}, results=2, read=(0, 1)),
    Case("Split", [X], {"axis": 2, "split": [5, 3]}, results=2, read=(0, 1), opset=11),
    Case("Slice", [X, "s", "e", "a"], constants={"s": whole(1, -3), "e": whole(99, -1), "a": whole(1, 2)}),
    Case("Slice", [X, "s", "e", "a", "t"], constants={"s": whole(0), "e": whole(7), "a": whole(2), "t": whole(3)}),
    Case("Slice", [X, "s", "e", "a", "t"], constants={"s": whole(-1), "e": whole(-(2**63)), "a": whole(2), "t": whole(-1)}),
    Case("Slice", [X, "s", "e", "a", "t"], constants={"s": whole(6), "e": whole(1), "a": whole(2), "t": whole(-2)}),
    Case("Slice", [X, "s", "e"], constants={"s": whole(1), "e": whole(2)}),
    Case("Gather", ["table", ints(11, 2, 5)], constants={"table": rand(11, 8)}),
    Case("Gather", ["table", ints(11, 2, 5) - 11], constants={"table": rand(11, 8, 2)}),
    Case("Gather", [X, "i"], {"axis": 1}, {"i": torch.tensor(-1, dtype=I64)}),
    Case("Gather", [X, "i"], {"axis": -1}, {"i": whole(2, 3, 4)}),
    Case("Gather", [X, "i"], {"axis": -1}, {"i": whole(7, 0, -1)}),
    Case("GatherElements", [X, ints(8, 2, 3, 2) - 4], {"axis": 2}),
    Case("GatherND", [X, torch.stack([ints(2, 5), ints(3, 5)], -1)]),
    Case("GatherND", [X, ints(3, 2, 1)], {"batch_dims": 1}, stays=True),
    Case("ScatterND", [X, torch.tensor([[0, 1], [1, 2]]), rand(2, 8)]),
    Case("ScatterElements", [X, torch.tensor([[[0, -1]]]), rand(1, 1, 2)], {"axis": 2}),
    Case("Range", ["a", "b", "c"], constants={"a": torch.tensor(2), "b": torch.tensor(100), "c": torch.tensor(1)}),
    Case("Range", ["a", "b", "c"], constants={"a": torch.tensor(2.0), "b": torch.tensor(5.0), "c": torch.tensor(0.5)}),
    Case("ConstantOfShape", ["s"], {"value": torch.tensor([3])}, {"s": whole(2, 3)}),
    Case("ConstantOfShape", ["s"], {"value": torch.tensor([3])}, {"s": whole(2)}),
    Case("ConstantOfShape", ["s"], {}, {"s": whole(70)}),
    Case("Trilu", [X], {"upper": 0}),
    Case("Trilu", [X, "k"], {"upper": 1}, {"k": torch.tensor(1)}),
    Case("EyeLike", [rand(4, 6)]),
    Case("OneHot", [ints(5, 2, 3), "d", "v"], {}, {"d": torch.tensor(5), "v": torch.tensor([0.0, 2.0])}),
    Case("Pad", [IMAGE, "p"], {}, {"p": whole(0, 1, 2, 0, 0, 0, 3, 1)}),
    Case("Pad", [IMAGE, "p", "v"], {}, {"p": whole(0, 0, 1, 1, 0, 0, 1, 1), "v": torch.tensor(2.5)}),
    Case("Pad", [IMAGE, "p", "", "a"], {"mode": "reflect"}, {"p": whole(1, 2), "a": whole(-1)}),
    Case("Pad", [IMAGE, "p"], {"mode": "edge"}, {"p": whole(0, 0, 1, 1, 0, 0, 2, 1)}),
    Case("DepthToSpace", [rand(2, 8, 3, 5)], {"blocksize": 2}),
    Case("DepthToSpace", [rand(2, 8, 3, 5)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [rand(2, 3, 4, 6)], {"blocksize": 2}),
    # reductions
    *[Case(f"Reduce{kind}", [X, "a"], {"keepdims": keep}, {"a": whole(-1, 0)}) for kind in ("Mean", "Sum") for keep in (0, 1)],
    *[Case(f"Reduce{kind}", [X], {"axes": [1]}, opset=11) for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2")],
    *[Case(f"Reduce{kind}", [X, "a"], {}, {"a": whole(1)}) for kind in ("Max", "Min", "Prod", "SumSquare", "LogSumExp")],
    Case("ReduceLogSum", [X.abs(), "a"], {}, {"a": whole(1)}),
    Case("ReduceMean", [X]),
    Case("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    Case("ArgMax", [X], {"axis": -1, "keepdims": 0}),
    Case("ArgMin", [X], {"axis": 1}),
    Case("TopK", [X, "k"], {"axis": -1}, {"k": whole(3)}, results=2, read=(0, 1)),
    Case("TopK", [X, "k"], {"axis": 1, "largest": 0}, {"k": whole(2)}, results=2, read=(0, 1)),
    Case("CumSum", [X, "a"], {}, {"a": torch.tensor(1)}),
    Case("CumSum", [X, "a"], {"exclusive": 1}, {"a": torch.tensor(1)}, stays=True),
    Case("NonZero", [X.round()]),
    # products
    Case("MatMul", [X, "w"], constants={"w": rand(8, 5)}),
    Case("MatMul", [X, X.transpose(1, 2).contiguous()]),
    Case("MatMul", [rand(8), "w"], constants={"w": rand(8, 5)}),
    Case("Gemm", [rand(4, 8), "w", "b"], {"transB": 1}, {"w": rand(5, 8), "b": rand(5)}),
    Case("Gemm", [rand(4, 8), "w", "b"], {}, {"w": rand(8, 5), "b": rand(5)}),
    Case("Gemm", [rand(8, 4), "w", "b"], {"transA": 1, "alpha": 0.5, "beta": 2.0}, {"w": rand(8, 5), "b": rand(4, 1)}),
    Case("Gemm", [rand(4, 8), "w"], {"alpha": 3.0}, {"w": rand(8, 5)}),
    Case("FusedMatMul", [X, X], {"transB": 1, "alpha": 0.3}, domain=CONTRIB),
    Case("FusedMatMul", [X, X], {"transA": 1}, domain=CONTRIB),
    Case("Einsum", [X, "w"], {"equation": "bti,oi->bto"}, {"w": rand(5, 8)}),
    Case("Conv", [IMAGE, "w", "b"], {"pads": [1, 1, 1, 1], "strides": [2, 1]}, {"w": rand(6, 4, 3, 3), "b": rand(6)}),
    Case("Conv", [IMAGE, "w"], {"pads": [0, 1, 2, 1], "dilations": [2, 1], "group": 2}, {"w": rand(6, 2, 3, 3)}),
    Case("Conv", [IMAGE, "w"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"w": rand(6, 4, 3, 2)}),
    Case("Conv", [IMAGE, "w"], {"auto_pad": "SAME_LOWER"}, {"w": rand(6, 4, 2, 2)}),
    Case("Conv", [rand(2, 4, 9), "w"], {}, {"w": rand(6, 4, 3)}),
    Case("ConvTranspose", [IMAGE, "w", "b"], {"pads": [1, 0, 1, 0], "strides": [2, 2]}, {"w": rand(4, 3, 3, 2), "b": rand(3)}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1]}, stays=True),
    Case("GlobalAveragePool", [IMAGE]),
    Case("GlobalMaxPool", [IMAGE]),
    Case(
        "Resize", [IMAGE, "", "s"],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"s": torch.tensor([1.0, 1.0, 2.0, 3.0])},
    ),
    Case("Resize", [IMAGE, "", "", "s"], {"mode": "linear"}, {"s": whole(2, 4, 13, 20)}),
    Case("Resize", [IMAGE, "", "s"], {"mode": "cubic", "cubic_coeff_a": -0.75}, {"s": torch.tensor([1.0, 1.0, 2.0, 2.0])}),
    Case("Resize", [IMAGE, "", "s"], {"mode": "nearest"}, {"s": torch.tensor([1.0, 1.0, 2.0, 3.0])}, stays=True),
    # norms
    Case("LayerNormalization", [X, "w", "b"], {"epsilon": 1e-6}, NORM),
    Case("LayerNormalization", [X, "w"], {"axis": 2}, NORM),
    Case("LayerNormalization", [X, "w"], {"axis": 1}, {"w": rand(3, 8)}),
    Case("LayerNormalization", [X, "w"], {"axis": 1}, NORM),
    Case("RMSNormalization", [X, "w"], {"epsilon": 1e-6}, NORM, opset=23),
    Case("SimplifiedLayerNormalization", [X, "w"], {"epsilon": 1e-6}, NORM),
    Case("SkipLayerNormalization", [X, rand(2, 3, 8), "w", "b"], {}, NORM, CONTRIB, results=4, read=(0, 3)),
    Case("SkipLayerNormalization", [X, rand(2, 3, 8), "w", "b", "w"], {}, NORM, CONTRIB),
    Case("SkipSimplifiedLayerNormalization", [X, rand(2, 3, 8), "w"], {}, NORM, CONTRIB, results=4, read=(0, 3)),
    Case("BatchNormalization", [IMAGE, *"wbmv"], {}, {**dict(zip("wbm", rand(3, 4))), "v": rand(4).abs()}),  # noqa: B905
    Case("InstanceNormalization", [IMAGE, "w", "b"], {}, {"w": rand(4), "b": rand(4)}),
    Case("GroupNormalization", [IMAGE, "w", "b"], {"num_groups": 2}, {"w": rand(4), "b": rand(4)}),
    Case(
        "EmbedLayerNormalization",
        [ints(9, 2, 5).int(), ints(2, 2, 5).int(), *"wpsgb", torch.tensor([[1] * 5, [1, 1, 0, 0, 0]], dtype=I32)],
        {}, {"w": rand(9, 8), "p": rand(12, 8), "s": rand(2, 8), "g": rand(8), "b": rand(8)}, CONTRIB, results=2, read=(0, 1),
    ),
    # attention
    *[
        Case("Attention", [Q, "w", "b", *mask], {"num_heads": 4, **more}, {"w": rand(16, 48), "b": rand(48)}, CONTRIB)
        for mask, more in [
            ([], {}),
            ([SEEN[:, :6].contiguous()], {}),
            ([torch.tensor([6, 2], dtype=I32)], {}),
            ([], {"unidirectional": 1, "scale": 0.4}),
            (["", "", rand(2, 4, 6, 6)], {}),
        ]
    ],
    *[
        Case("MultiHeadAttention", [Q, K, V, *more], {"num_heads": 4}, {"b": rand(48)}, CONTRIB)
        for more in [[], ["b"], ["", SEEN], ["", "", rand(2, 4, 6, 9)], ["", SEEN, rand(1, 4, 6, 9)]]
    ],
    Case("MultiHeadAttention", [Q, Q, Q], {"num_heads": 4, "unidirectional": 1}, domain=CONTRIB),
    Case("Attention", [Q, K, V], {"q_num_heads": 4, "kv_num_heads": 4}, opset=23),
    Case("Attention", [Q, Q[:, :, :8], Q[:, :, :8]], {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}, opset=23),
    Case("Attention", [Q, K, V, rand(6, 9)], {"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.3}, opset=23),
    Case("Attention", [rand(2, 4, 6, 8), rand(2, 4, 9, 8), rand(2, 4, 9, 8), rand(2, 1, 6, 9) > -1], opset=23),
    *[
        Case(
            "RotaryEmbedding", [x, torch.arange(6).expand(2, 6), "c", "s"],
            {"interleaved": inter, **more}, {"c": rand(20, 4), "s": rand(20, 4)}, CONTRIB,
        )
        for x, more in [(Q, {}), (rand(2, 3, 6, 8), {}), (rand(2, 3, 6, 12), {"rotary_embedding_dim": 8, "num_heads": 3})]
        for inter in (0, 1)
    ],
    Case("RotaryEmbedding", [rand(2, 3, 6, 8), rand(2, 6, 4), rand(2, 6, 4)], opset=23),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_gives_what_onnxruntime_gives(case: Case, tmp_path: Path) -> None:
    names, given = [], {}
    for i, value in enumerate(case.inputs):
        names.append(value if isinstance(value, str) else f"x{i}")
        if isinstance(value, Tensor):
            given[f"x{i}"] = value.contiguous()
    results = [f"y{i}" if i in case.read else "" for i in range(case.results)]
    attributes = {
        name: helper.make_tensor("t", 7, list(v.shape), v.tolist()) if isinstance(v, Tensor) else v
        for name, v in case.attributes.items()
    }
    node = helper.make_node(case.type, names, results, domain=case.domain, **attributes)
    inputs = {name: (value.dtype, list(value.shape)) for name, value in given.items()}
    held = {name: value for name, value in case.constants.items() if name in names}
    model = file_of([node], inputs, [r for r in results if r], held, opset=case.opset, contrib=bool(case.domain))
    wanted = by_onnxruntime(model, given)
    module = OnnxModule(read(saved(model, tmp_path / "m.onnx"))).eval()
    with torch.no_grad():
        found = module(**given)
    assert list(found) == list(wanted)
    assert bool(module.kept.nodes) == case.stays
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        if value.is_floating_point() and bool(torch.isfinite(value).all()):
            assert_close(found[name], value, terms=case.terms)
        else:
            assert torch.equal(found[name], value)


def test_no_function_goes_untested() -> None:
    quantized = {kind for kind, run in operators().items() if run.__name__ == "_left"}
    tested = {(case.domain, case.type) for case in CASES}
    elsewhere = {
        ("", "Dropout"),
        ("", "BitwiseAnd"),
        ("", "BitwiseOr"),
        ("", "BitwiseXor"),
        ("", "BitwiseNot"),
        ("", "Swish"),
    }
    assert {kind for kind in operators() if kind not in quantized} - tested - elsewhere == set()
