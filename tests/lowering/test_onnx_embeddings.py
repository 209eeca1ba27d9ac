"""Embedding tables of integers in ONNX: the same numbers as the rounded table, held once with a tied head."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import recast
from recast.lowering.agreement import agree
from recast.patterns.errors import TargetError
from recast.patterns.program import get_by_path
from tests.helpers import assert_close
from tests.lowering.test_onnx_decoder import greedy, ids, made

pytest.importorskip("onnxruntime")


class Lookup(nn.Module):
    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, features)
        self.out = nn.Linear(features, 5)

    def forward(self, tokens: torch.Tensor) -> Any:
        found = self.table(tokens)
        return found, self.out(found)


def lookup(rows: int = 37, features: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return recast.capture(Lookup(rows, features).to(dtype).eval(), (torch.tensor([[1, 2, 36], [5, 0, 7]]),))


def operators(artifact: Any) -> list[str]:
    return [node.op_type for node in artifact.lowering._model.graph.all_nodes()]


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("form", ["int2(group=16", "int4(group=16", "int4(group=64", "int8(group=16", "int8(group=32"])
@pytest.mark.parametrize("style", ["qoperator", "qdq"])
def test_rows_are_those_of_the_rounded_table(form: str, symmetric: str, style: str) -> None:
    program, text = lookup(), f"{form}, symmetric={symmetric})"
    artifact = recast.lower(program, target="onnx", embeddings=text, style=style)
    assert ("GatherBlockQuantized" in operators(artifact)) == (style == "qoperator")
    assert all(not node.domain for node in artifact.lowering._model.graph.all_nodes() if style == "qdq")
    table = recast.Form.parse(text).fit(get_by_path(program.module, "table.weight").detach()).to_dense()
    tokens = torch.tensor([[36, 0, 9, 9, 1]])
    found, product = artifact(tokens)
    assert_close(found, table[tokens], terms=2)
    weight, bias = (get_by_path(program.module, f"out.{name}").detach() for name in ("weight", "bias"))
    assert_close(product, table[tokens] @ weight.T + bias, terms=64)
    assert agree(artifact).agreement


def test_the_report_tells_the_error_and_the_bytes() -> None:
    artifact = recast.lower(lookup(), target="onnx", embeddings="int4(group=16)")
    (note,) = [n for n in artifact.report.notes if n.startswith("embeddings")]
    assert "table.weight in 4 bits, relative error 0.0" in note
    assert f"{37 * (32 + 16)} bytes instead of {37 * 256}" in note


def test_half_precision_tables() -> None:
    program = lookup(dtype=torch.float16)
    artifact = recast.lower(program, target="onnx", embeddings="int8(group=32)")
    assert "GatherBlockQuantized" in operators(artifact)
    tokens = torch.tensor([[36, 0, 9]])
    table = recast.Form.parse("int8(group=32)").fit(get_by_path(program.module, "table.weight").detach()).to_dense()
    assert artifact(tokens)[0].dtype == torch.float16
    assert_close(artifact(tokens)[0], table[tokens], terms=2)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("int4(group=24)", "groups of 24.*powers of two"),
        ("int8", "powers of two"),
        ("int3(group=32)", "2, 4 or 8 bits"),
        ("low_rank(rank=4)", "2, 4 or 8 bits"),
        ("int8(group=32, activations=true)", "2, 4 or 8 bits"),
    ],
)
def test_what_rows_cannot_be_is_refused(form: str, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        recast.lower(lookup(), target="onnx", embeddings=form)


def test_groups_that_do_not_divide_leave_the_table() -> None:
    artifact = recast.lower(lookup(features=40), target="onnx", embeddings="int4(group=16)")
    assert "GatherBlockQuantized" not in operators(artifact)
    assert any("40 features are no multiple of 16" in note for note in artifact.report.notes)


def tied(head: str | None) -> tuple[Any, Any]:
    model = made("Llama", tie_word_embeddings=True)
    program = recast.capture(model, (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
    if head is None:
        return model, program
    recipe = recast.Recipe.of({"rules": [{"match": "model.embed_tokens", "form": head}]})
    return model, recast.rewrite(program, recast.plan(program, recipe), verification=False)


def codes(artifact: Any) -> list[tuple[int, ...]]:
    """Shapes of initializers of bytes."""
    values = artifact.lowering._model.graph.initializers.values()
    return [tuple(v.const_value.shape) for v in values if v.const_value.dtype.name == "UINT8"]


def test_a_tied_head_and_its_table_are_one() -> None:
    model, program = tied("int4(group=16)")
    artifact = recast.lower(program, target="onnx", embeddings="int4(group=16)")
    assert codes(artifact) == [(97, 4, 8)]
    assert not [v for v in artifact.lowering._model.graph.initializers.values() if tuple(v.shape) == (97, 64)]  # type: ignore[attr-defined]
    assert any("the codes of the head" in note for note in artifact.report.notes)
    assert agree(artifact).agreement
    # Greedy tokens are those of PyTorch with the same rounded matrix on both sides.
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        rounded.model.embed_tokens.weight.copy_(artifact.lowering._tables[0].operator.to_dense())  # type: ignore[attr-defined]
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    assert recast.Generator(artifact).generate(prompts, 16).ids == [greedy(rounded, prompt, 16) for prompt in prompts]


def test_other_groups_than_the_heads_are_held_apart() -> None:
    _, program = tied("int4(group=32)")
    artifact = recast.lower(program, target="onnx", embeddings="int4(group=16)")
    assert sorted(codes(artifact)) == [(97, 2, 16), (97, 4, 8)]
    assert agree(artifact).agreement


def test_a_dense_head_keeps_its_table() -> None:
    _, program = tied(None)
    artifact = recast.lower(program, target="onnx", embeddings="int4(group=16)")
    assert "GatherBlockQuantized" not in operators(artifact)
    assert any("stays dense" in note and "needs it so" in note for note in artifact.report.notes)


def test_a_saved_one_is_read_again(tmp_path: Any) -> None:
    artifact = recast.lower(lookup(), target="onnx", embeddings="int4(group=16)")
    artifact.save(tmp_path / "out")
    tokens = torch.tensor([[36, 0, 9]])
    again = recast.load(tmp_path / "out")
    assert torch.equal(again(tokens)[0], artifact(tokens)[0])
    assert again.lowering.embeddings == "int4(group=16)"  # type: ignore[attr-defined]
