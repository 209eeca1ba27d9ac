"""Logits of the last token alone: the same numbers, from fewer rows."""

from typing import Any

import pytest
import torch

import recast
from recast.lowering.onnx.last import keep_last
from recast.patterns.capture.decoder import empty_past
from recast.patterns.errors import TargetError
from tests.helpers import assert_close
from tests.lowering.test_onnx_decoder import exported, greedy, ids, made

pytest.importorskip("onnxruntime")


def program_of(kind: str, recipe: str | None = None) -> Any:
    program = recast.capture(made(kind), (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
    return program if recipe is None else recast.rewrite(program, recast.plan(program, recipe), verification=False)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "GPT2"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_rows_are_those_of_each_texts_last_token(kind: str, side: str) -> None:
    program = program_of(kind)
    narrowed, count = keep_last(program)
    assert count > 1
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    if side != "none":
        for row, length in enumerate((4, 9, 1)):
            mask[row, length:] = 0
        mask = mask.flip(1) if side == "left" else mask
    given = (tokens, mask, empty_past(made(kind), 3))
    with torch.no_grad():
        wanted, found = program(*given), narrowed(*given)
    last = (mask * torch.arange(9)).argmax(-1)
    assert found["logits"].shape == (3, 1, 97)
    assert_close(found["logits"][:, 0], wanted["logits"][torch.arange(3), last], terms=64)
    assert all(
        torch.equal(a, b)
        for x, y in zip(found["present"], wanted["present"], strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_token_after_others_is_the_last() -> None:
    program = program_of("Llama")
    narrowed, _ = keep_last(program)
    given = (ids(2, 3), torch.ones(2, 10, dtype=torch.int64), empty_past(made("Llama"), 2, 7))
    with torch.no_grad():
        assert_close(narrowed(*given)["logits"], program(*given)["logits"][:, -1:], terms=64)


@pytest.mark.parametrize("recipe", [None, "int4(group=16)"])
def test_all_after_the_last_attention_is_computed_for_one_token(recipe: str | None) -> None:
    narrowed, _ = keep_last(program_of("Llama", recipe))
    lengths: dict[str, Any] = {
        str(n.target): n.meta["val"].shape for n in narrowed.graph.nodes if n.op == "call_module"
    }
    lengths |= {n.name: n.meta["val"].shape for n in narrowed.graph.nodes if n.target is torch.ops.aten.linear.default}
    alone = [name for name, shape in lengths.items() if shape[1] == 1]
    assert len(lengths) == 15
    assert len(alone) == 5  # the output projection, three matrices of the MLP, the head


def test_what_is_given_back_besides_the_logits_keeps_all_tokens() -> None:
    program = program_of("Llama")
    (output,) = program.graph.find_nodes(op="output")
    logits, *rest = output.args[0]
    before = next(iter(logits.all_input_nodes))
    output.args = ((logits, before, *rest[1:]),)
    narrowed, _ = keep_last(program)
    (output,) = narrowed.graph.find_nodes(op="output")
    assert output.args[0][0].meta["val"].shape[1] == 1
    assert output.args[0][1].meta["val"].shape[1] != 1


@pytest.mark.parametrize("attention", ["auto", "standard"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_tokens_do_not_depend_on_it(attention: str, logits: str) -> None:
    artifact = exported("Llama", attention=attention, logits=logits)
    length = {"last": 1, "all": "sequence"}[logits]
    assert artifact.lowering.session.get_outputs()[0].shape == ["batch", length, 97]  # type: ignore[attr-defined]
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist(), [3]]
    found = recast.Generator(artifact).generate(prompts, 12).ids
    assert found == [greedy(made("Llama"), prompt, 12) for prompt in prompts]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(TargetError, match="logits is 'first'; 'last' or 'all' would work"):
        exported("Llama", logits="first")
