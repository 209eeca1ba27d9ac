"""Where an ONNX model begins to differ from a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast
from recast.bisecting import bisect
from recast.patterns.errors import CalibrationError, ModelError
from recast.patterns.program import Program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Blocks(nn.Module):
    """Residual blocks, so that a difference does not reach everything; the first is right whatever happens to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up = nn.ModuleList(nn.Linear(24, 40) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(40, 24) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.nn.functional.gelu(up(x)))
        return x, x.softmax(-1)


@pytest.fixture
def program() -> Program:
    return recast.capture(Blocks().eval(), (torch.randn(3, 5, 24),))


@pytest.fixture
def exported(program: Program, tmp_path: Path) -> Path:
    recast.lower(program, "onnx").save(tmp_path / "out")
    return tmp_path / "out" / "model.onnx"


def changed(file: Path, change: Callable[[Any], None]) -> Path:
    """A model with another weight: that of the second block's second product."""
    read = onnx.load(str(file))
    products = [node for node in read.graph.node if node.op_type in ("MatMul", "Gemm")]
    by_name = {held.name: held for held in read.graph.initializer}
    change(by_name[products[3].input[1]])
    onnx.save(read, str(file.with_name("other.onnx")))
    return file.with_name("other.onnx")


def test_what_agrees_is_said(program: Program, exported: Path) -> None:
    found = bisect(program, exported, {"x": torch.randn(2, 7, 24)})
    assert found.agree
    assert max(found.outputs) < 1e-5
    assert str(found).startswith("agrees to ")


def test_the_first_product_that_differs_is_found(program: Program, exported: Path) -> None:
    def double(held: Any) -> None:
        array = onnx.numpy_helper.to_array(held).copy()
        array[3, 4] += 1
        held.CopyFrom(onnx.numpy_helper.from_array(array, held.name))

    found = bisect(program, changed(exported, double), {"x": torch.randn(2, 7, 24)})
    assert not found.agree
    (node,) = [n for n in program.graph.nodes if n.name == found.node]
    assert "linear" in found.operation
    assert node.args[1].target == "down.1.weight"
    assert found.where == "down.1"
    assert "test_bisecting.py" in found.source
    assert found.operator in ("MatMul", "Gemm", "Add")
    assert found.gap is not None
    assert found.gap > 1e-3
    assert 0 < found.alike < found.compared
    assert "down.1" in str(found)


def test_a_rewritten_program_agrees_and_the_dense_one_does_not(program: Program, tmp_path: Path) -> None:
    recipe = {"rules": [{"match": "up.1", "form": "int3(group=8)"}], "allow_larger": True}
    rewritten = recast.rewrite(program, recast.plan(program, recipe), verification=False)
    recast.lower(rewritten, "onnx").save(tmp_path / "out")
    file, batch = tmp_path / "out" / "model.onnx", {"x": torch.randn(2, 7, 24)}
    assert bisect(rewritten, file, batch).agree
    found = bisect(program, file, batch)
    assert not found.agree
    assert found.where == "up.1"


def test_a_fault_of_a_fusion_is_told_from_one_of_the_file(
    program: Program, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Faulty(onnxruntime.InferenceSession):  # type: ignore[misc]
        """Adds a tenth where graphs may be optimized."""

        def __init__(self, path: str, options: Any, **more: Any) -> None:
            super().__init__(path, options, **more)
            plain = options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.added = 0 if plain else 0.1

        def run(self, *given: Any) -> Any:
            return [value + value.dtype.type(self.added) for value in super().run(*given)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Faulty)
    found = bisect(program, exported, {"x": torch.randn(2, 7, 24)})
    assert found.fused
    assert not found.agree
    assert "own fusions" in str(found)


def test_bad_input_is_one_message(program: Program, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not run on the batch"):
        bisect(program, exported, {"x": torch.randn(2, 7, 23)})
    with pytest.raises(CalibrationError, match="does not run on the batch"):
        bisect(program, exported, {})
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"does not run 'cut\.onnx'"):
        bisect(program, tmp_path / "cut.onnx", {"x": torch.randn(2, 7, 24)})
