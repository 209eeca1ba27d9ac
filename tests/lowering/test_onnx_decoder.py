"""Decoders with their key-value cache in ONNX: names, numbers, and tokens equal to those of PyTorch."""

import collections
import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recast
from recast.lowering.artifact import Artifact
from recast.patterns.capture.decoder import empty_past
from recast.patterns.errors import CaptureError, TargetError
from tests.helpers import assert_close

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

TOKENS, POSITIONS = 97, 64
SMALL = {
    "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}


@functools.cache
def made(kind: str, **changes: Any) -> Any:
    configs = {
        "Llama": GROUPED,
        "Mistral": {**GROUPED, "sliding_window": 7, "head_dim": 16},
        "Qwen2": GROUPED,
        "Qwen3": {**GROUPED, "head_dim": 16},
        "Gemma": {**GROUPED, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
        "GPT2": {"vocab_size": TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS,
                 "eos_token_id": None, "bos_token_id": None},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**configs[kind], **changes})
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


@functools.cache
def exported(kind: str, attention: str = "auto", genai: bool = False, logits: str = "last", **changes: Any) -> Artifact:
    program = recast.capture(made(kind, **changes), (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
    return recast.lower(program, target="onnx", attention=attention, genai=genai, logits=logits)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
        )
    return list(found[0, len(prompt) :].tolist())


KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "GPT2"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_pytorch(kind: str) -> None:
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    found = recast.Generator(exported(kind)).generate(prompts, 32)
    assert found.ids == [greedy(made(kind), prompt, 32) for prompt in prompts]
    assert found.steps == 31


def test_one_graph_computes_prompt_and_single_tokens() -> None:
    model, artifact = made("Llama"), exported("Llama", logits="all")
    tokens = ids(3, 9)
    with torch.no_grad():
        wanted = model(tokens).logits
    whole = artifact(tokens, torch.ones_like(tokens), empty_past(model, 3))
    assert_close(whole["logits"], wanted, terms=64)
    held, parts = empty_past(model, 3), []
    for start, end in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)]:
        result = artifact(tokens[:, start:end], torch.ones(3, end, dtype=torch.int64), held)
        held = result["present"]
        parts.append(result["logits"])
    assert_close(torch.cat(parts, 1), wanted, terms=64)
    assert [tuple(t.shape) for pair in held for t in pair] == [(3, 2, 9, 16)] * 4


def test_several_tokens_after_others_are_for_one_text_at_a_time() -> None:
    model, artifact = made("Llama"), exported("Llama", logits="all")
    tokens = ids(1, 9)
    first = artifact(tokens[:, :4], torch.ones(1, 4, dtype=torch.int64), empty_past(model, 1))
    rest = artifact(tokens[:, 4:], torch.ones(1, 9, dtype=torch.int64), first["present"])
    with torch.no_grad():
        assert_close(rest["logits"], model(tokens).logits[:, 4:], terms=64)
    with pytest.raises(TargetError, match="batch_size must be 1"):
        artifact(ids(2, 5), torch.ones(2, 9, dtype=torch.int64), empty_past(model, 2, 4))


def test_inputs_and_outputs_have_the_usual_names(tmp_path: Path) -> None:
    exported("Llama").save(tmp_path / "out")
    session = recast.load(tmp_path / "out").lowering.session  # type: ignore[attr-defined]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    caches = {f"past_key_values.{i}.{role}": ["batch", 2, "past", 16] for i in range(2) for role in ("key", "value")}
    assert {name: inputs[name] for name in caches} == caches
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert set(inputs) == {"input_ids", "attention_mask", *caches}
    outputs = [value.name for value in session.get_outputs()]
    assert outputs == ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]


def test_a_saved_program_keeps_what_generation_needs(tmp_path: Path) -> None:
    program = recast.capture(made("Llama"), (), {"input_ids": ids(2, 5)}, cache=True)
    recast.lower(program, target="eager").save(tmp_path / "eager")
    again = recast.load(tmp_path / "eager").program
    assert again.decoder == program.decoder
    assert again.decoder is not None
    assert again.decoder["cache"] == [[2, 16, 16]] * 2
    assert again.decoder["positions"] == POSITIONS
    artifact = recast.lower(again, target="onnx")
    prompt = ids(6).tolist()
    assert recast.Generator(artifact).generate([prompt], 4).ids == [greedy(made("Llama"), prompt, 4)]


def test_capture_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(made("Llama"))
    recast.capture(model, (), {"input_ids": ids(1, 1)}, cache=True)
    assert "forward" not in vars(model)
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("model", "inputs", "told"),
    [
        (lambda: torch.nn.Linear(3, 3), {"input_ids": ids(2, 5)}, "no causal language model"),
        (lambda: made("Llama"), {"input_ids": torch.randn(2, 5, 32)}, r"input_ids \(batch, sequence\)"),
        (lambda: made("Llama"), {}, r"input_ids \(batch, sequence\)"),
    ],
)
def test_what_has_no_cache_is_refused(model: Any, inputs: Any, told: str) -> None:
    with pytest.raises(CaptureError, match=told):
        recast.capture(model(), (), inputs, cache=True)


def operators(artifact: Artifact) -> dict[str, int]:
    graph = artifact.lowering._model.graph  # type: ignore[attr-defined]
    return dict(collections.Counter(node.op_type for node in graph.all_nodes()))


@pytest.mark.parametrize(
    ("kind", "inside", "window"),
    [("Llama", 1, -1), ("Mistral", 1, 7), ("Qwen3", 1, -1), ("GPT2", 0, -1)],
)
def test_attention_is_one_operator_where_it_computes_the_same(kind: str, inside: int, window: int) -> None:
    graph = exported(kind).lowering._model.graph  # type: ignore[attr-defined]
    found = [node for node in graph.all_nodes() if node.op_type == "GroupQueryAttention"]
    assert len(found) == 2
    assert {node.attributes["do_rotary"].as_int() for node in found} == {inside}
    assert {node.attributes["local_window_size"].as_int() for node in found} == {window}
    assert "Softmax" not in operators(exported(kind))
    assert any("GroupQueryAttention" in note for note in exported(kind).report.notes)
    assert exported(kind).lowering.decoder["in_place"]  # type: ignore[attr-defined]


def test_standard_operators_give_the_same_tokens() -> None:
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    for kind in ("Llama", "Mistral"):
        artifact = exported(kind, attention="standard")
        assert "GroupQueryAttention" not in operators(artifact)
        found = recast.Generator(artifact).generate(prompts, 20).ids
        assert found == recast.Generator(exported(kind)).generate(prompts, 20).ids


def test_what_the_operator_does_not_compute_stays_in_standard_operators() -> None:
    artifact = exported("Llama", head_dim=12)
    assert "GroupQueryAttention" not in operators(artifact)
    assert any("12 features, which are no multiple of 8" in note for note in artifact.report.notes)
    prompt = ids(5).tolist()
    assert recast.Generator(artifact).generate([prompt], 8).ids == [greedy(made("Llama", head_dim=12), prompt, 8)]
    with pytest.raises(TargetError, match="no multiple of 8"):
        exported("Llama", attention="grouped", head_dim=12)


def test_genai_config_describes_the_graph(tmp_path: Path) -> None:
    exported("Llama", genai=True).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["type"] == "llama"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    assert config["search"]["past_present_share_buffer"]
    session = recast.load(tmp_path / "out").lowering.session  # type: ignore[attr-defined]
    names = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    told = [*decoder["inputs"].values(), *decoder["outputs"].values()]
    assert {name % layer if "%d" in name else name for name in told for layer in range(2)} == names


def test_weights_of_larger_decoders_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported("Llama").save(tmp_path / "small")
    assert not (tmp_path / "small" / "model.onnx.data").exists()
    monkeypatch.setattr("recast.lowering.onnx._MAPPED", 1 << 10)
    program = recast.capture(made("Llama"), (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
    recast.lower(program, target="onnx").save(tmp_path / "large")
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size > 100_000
    prompt = ids(5).tolist()
    assert recast.Generator(tmp_path / "large").generate([prompt], 8).ids == [greedy(made("Llama"), prompt, 8)]


def test_genai_config_is_refused_without_a_cache() -> None:
    program = recast.capture(torch.nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    with pytest.raises(TargetError, match="captured without"):
        recast.lower(program, target="onnx", genai=True)
