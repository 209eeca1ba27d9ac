"""Structured forms from plan to every target, and through a saved file."""

from pathlib import Path

import pytest
import torch
from torch import nn

import recast
from recast.passes.cache import OperatorCache
from tests.helpers import assert_close

FORMS = [
    "monarch(blocks=3, rank=2)",
    "monarch(3) | int8",
    "block_dense",
    "permuted_block_diagonal(3)",
    "blast(3, 8, iterations=3)",
    "diagonal + low_rank(4)",
    "diagonal @ permutation @ low_rank(9) @ diagonal",
    "permutation",
    "sparse_dictionary(atoms=6, nonzeros=2, iterations=2)",
]


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx"])
def test_every_target_computes_what_eager_does(target: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(36, 36, bias=i % 2 == 0) for i in range(len(FORMS)))).eval()
    program = recast.capture(model, (torch.randn(4, 5, 36),))
    rules = {"rules": [{"match": str(i), "form": text} for i, text in enumerate(FORMS)], "allow_larger": True}
    rewritten = recast.rewrite(program, recast.plan(program, rules), cache=OperatorCache(None), pictures=False)
    artifact = recast.lower(rewritten, target=target)
    artifact.save(tmp_path / "saved")
    loaded = recast.load(tmp_path / "saved")
    for batch in ((3, 1), (1, 36), (3, 17)):
        x = torch.randn(*batch, 36)
        with torch.no_grad():
            expected = rewritten(x)
            assert_close(artifact(x), expected, terms=36 * len(FORMS))
            assert torch.equal(loaded(x), artifact(x)) or target == "inductor"
            assert_close(loaded(x), expected, terms=36 * len(FORMS))
    if target == "onnx":
        import onnx

        kinds = {node.op_type for node in onnx.load(str(next((tmp_path / "saved").glob("*.onnx")))).graph.node}
        assert "Einsum" not in kinds
        assert {"MatMul", "Transpose", "Reshape", "Gather"} <= kinds
