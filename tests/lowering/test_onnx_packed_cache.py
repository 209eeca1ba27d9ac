"""A decoder's cache in int8: how far it rounds, what runs it, and what is refused."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import recast
from recast.lowering.artifact import Artifact
from recast.lowering.onnx.packed_cache import bytes_a_token, pack, round_cache, unpack
from recast.patterns.capture.decoder import empty_past
from recast.patterns.errors import TargetError
from recast.patterns.program import Program
from tests.helpers import assert_close
from tests.lowering.test_onnx_decoder import exported, ids, made

transformers = pytest.importorskip("transformers")
LLAMA = Path(__file__).parents[2] / "benchmarks" / "models" / "llama"


@pytest.mark.parametrize("size", [1, 8, 60, 63, 577])
def test_a_vector_is_rounded_by_half_a_step_of_its_largest_value(size: int) -> None:
    x = torch.randn(3, 2, 5, size) * torch.logspace(-2, 4, 5).unsqueeze(-1)
    held = pack(x)
    assert (held.dtype, tuple(held.shape)) == (torch.int8, (3, 2, 5, size + 1))
    step = x.abs().amax(-1, keepdim=True) / 127 * 2 ** (1 / 8)
    assert bool(((unpack(held) - x).abs() <= step * (0.5 + 1e-3)).all())
    assert bool((held[..., :-1].abs().amax(-1) > 127 / 2 ** (1 / 8) - 1).all())  # the codes are used up


def test_empty_and_zero_vectors() -> None:
    assert tuple(pack(torch.randn(2, 3, 0, 16)).shape) == (2, 3, 0, 17)
    assert torch.equal(unpack(pack(torch.zeros(2, 4, 16))), torch.zeros(2, 4, 16))


def captured(model: Any) -> Program:
    return recast.capture(model, (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)


@pytest.fixture(scope="module")
def packed() -> Artifact:
    return recast.lower(captured(made("Llama")), target="onnx", cache="int8", logits="all")


def test_the_graph_computes_what_the_rounded_program_computes(packed: Artifact) -> None:
    tokens, mask = ids(2, 4), torch.ones(2, 11, dtype=torch.int64)
    past = tuple((torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)) for _ in range(2))
    found = packed(tokens, mask, past)
    rounded = round_cache(packed.program)
    with torch.no_grad():
        wanted = rounded(tokens, mask, past)
    assert_close(found["logits"], wanted["logits"], terms=64)
    for pairs in zip(found["present"], wanted["present"], strict=True):
        for ours, theirs in zip(*pairs, strict=True):
            assert_close(ours, theirs, terms=64)
    with torch.no_grad():
        plain = packed.program(tokens, mask, past)
    gap = float((plain["logits"] - wanted["logits"]).norm() / plain["logits"].norm())
    assert 0 < gap < 0.02


def test_inputs_are_bytes_and_the_report_tells_how_many(packed: Artifact, tmp_path: Path) -> None:
    packed.save(tmp_path / "out")
    loaded = recast.load(tmp_path / "out")
    held = [v for v in loaded.lowering.session.get_inputs() if v.name.startswith("past_")]  # type: ignore[attr-defined]
    assert {(v.type, tuple(v.shape)) for v in held} == {("tensor(int8)", ("batch", 2, "past", 17))}
    assert bytes_a_token(packed.program) == (2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * 17)
    assert "cache: int8 with a scale for each head and token, 136 bytes a token instead of 512" in loaded.report.notes
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    wanted = recast.Generator(packed).generate(prompts, 12).ids
    assert recast.Generator(loaded).generate(prompts, 12).ids == wanted
    assert [recast.Generator(loaded).generate([prompt], 12).ids[0] for prompt in prompts] == wanted


def test_the_language_model_hardly_notices() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    program = captured(model)
    text = (inspect.getdoc(inspect) or "") + (inspect.getsource(inspect.getmodulename))
    tokens = torch.tensor([tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json")).encode(text).ids])
    with torch.no_grad():
        plain, rounded = (
            one(tokens, torch.ones_like(tokens), empty_past(model, 1))["logits"]
            for one in (program, round_cache(program))
        )
    gap = float((rounded - plain).abs().max() / plain.abs().max())
    assert 0 < gap < 0.02, gap
    alike = float((rounded.argmax(-1) == plain.argmax(-1)).float().mean())
    assert alike > 0.95, alike
    before, after = bytes_a_token(program)
    assert (before, after) == (6 * 2 * 4 * 32 * 4, 6 * 2 * 4 * 33)


def test_what_cannot_be_packed_is_refused() -> None:
    linear = recast.capture(torch.nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    with pytest.raises(TargetError, match="captured without"):
        recast.lower(linear, target="onnx", cache="int8")
    with pytest.raises(TargetError, match="'float' or 'int8'"):
        recast.lower(linear, target="onnx", cache="int4")
    for other in ({"attention": "grouped"}, {"genai": True}):
        with pytest.raises(TargetError, match="attention='standard' and without genai"):
            recast.lower(linear, target="onnx", cache="int8", **other)


def test_a_cache_that_is_used_otherwise_is_refused() -> None:
    program = captured(made("Llama")).copy()
    past = next(node for node in program.inputs() if str(node.target).startswith("past_key_values_0_0"))
    joined = next(user for user in past.users if user.target is torch.ops.aten.cat.default)
    joined.args = ([joined.args[0][1], past], *joined.args[1:])  # type: ignore[index]
    with pytest.raises(TargetError, match="'past_key_values_0_0' is used otherwise"):
        round_cache(program)


def test_a_cache_in_floats_says_nothing() -> None:
    assert not any(note.startswith("cache:") for note in exported("Llama").report.notes)
