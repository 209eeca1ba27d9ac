"""Decoders with their key-value cache in ONNX: names, numbers, and tokens equal to those of PyTorch."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recast
from recast.lowering.artifact import Artifact
from recast.patterns.capture.decoder import empty_past
from recast.patterns.errors import CaptureError
from tests.helpers import assert_close

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

TOKENS, POSITIONS = 97, 64
SMALL = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}


@functools.cache
def made(kind: str, **changes: Any) -> Any:
    configs = {
        "Llama": GROUPED,
        "Mistral": {**GROUPED, "sliding_window": 7, "head_dim": 8},
        "Qwen2": GROUPED,
        "Qwen3": {**GROUPED, "head_dim": 16},
        "Gemma": {**GROUPED, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
        "GPT2": {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS,
                 "eos_token_id": None, "bos_token_id": None},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**configs[kind], **changes})
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


@functools.cache
def exported(kind: str) -> Artifact:
    program = recast.capture(made(kind), (), {"input_ids": torch.ones(2, 5, dtype=torch.int64)}, cache=True)
    return recast.lower(program, target="onnx")


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
    model, artifact = made("Llama"), exported("Llama")
    tokens = ids(3, 9)
    with torch.no_grad():
        wanted = model(tokens).logits
    whole = artifact(tokens, torch.ones_like(tokens), empty_past(model, 3))
    assert_close(whole["logits"], wanted)
    held, parts = empty_past(model, 3), []
    for start, end in [(0, 4), (4, 5), (5, 6), (6, 9)]:
        result = artifact(tokens[:, start:end], torch.ones(3, end, dtype=torch.int64), held)
        held = result["present"]
        parts.append(result["logits"])
    assert_close(torch.cat(parts, 1), wanted)
    assert [tuple(t.shape) for pair in held for t in pair] == [(3, 2, 9, 8)] * 4


def test_inputs_and_outputs_have_the_usual_names(tmp_path: Path) -> None:
    exported("Llama").save(tmp_path / "out")
    session = recast.load(tmp_path / "out").lowering.session  # type: ignore[attr-defined]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    caches = {f"past_key_values.{i}.{role}": ["batch", 2, "past", 8] for i in range(2) for role in ("key", "value")}
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
    assert again.decoder["cache"] == [[2, 8, 8]] * 2
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
