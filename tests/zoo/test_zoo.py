"""A quick part of the zoo: the models build, are captured, and no less is recognised in them than was before.

Golden numbers are in `golden.json`, found / there. A drop fails, a rise does not; `pytest tests/zoo --accept` rewrites them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recast.patterns.capture.export import capture
from recast.patterns.recognise import recognise
from tests import zoo
from tests.zoo.compare import compare, gap
from tests.zoo.truth import observe

GOLDEN = Path(__file__).with_name("golden.json")
KINDS = ("matrices", "attention", "moe", "norms")

# Of every kind some, chosen for how quickly they are captured.
QUICK = (
    *("albert", "bert", "distilbert", "electra", "mpnet", "nomic_bert", "roberta", "modernbert", "fnet", "squeezebert"),
    *(
        "bloom",
        "codegen",
        "cohere",
        "falcon",
        "gemma",
        "gemma2",
        "glm",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
    ),
    *("llama", "mistral", "mpt", "nemotron", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
    *("starcoder2", "granite", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe", "mamba", "bart", "t5"),
)

# With free sizes, which costs three times as much; the others with those of the example.
FREE = {"bert", "gpt2", "llama", "gemma2", "qwen3_moe", "t5"}


def _golden() -> dict[str, dict[str, list[int]]]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


@pytest.mark.parametrize("name", QUICK)
def test_coverage(name: str, accept: bool) -> None:
    model, args, kwargs = zoo.build(name)
    truth, expected = observe(model, args, kwargs)
    program = capture(model, args, kwargs, dynamic_shapes=None if name in FREE else dict.fromkeys(kwargs))
    with torch.no_grad():
        assert gap([program(*args, **kwargs)[0]], [expected[0]]) == ""
    row = compare(truth, program, recognise(program))
    found: dict[str, list[int]] = {kind: row[kind] for kind in KINDS}
    if accept:
        golden = _golden() | {name: found}
        text = ",\n".join(f' "{n}": {json.dumps(golden[n])}' for n in sorted(golden))
        GOLDEN.write_text("{\n" + text + "\n}\n")
    before = _golden()[name]
    for kind in KINDS:
        assert found[kind][1] == before[kind][1], f"{name}: {kind} there are {found[kind][1]}, were {before[kind][1]}"
        assert found[kind][0] >= before[kind][0], (
            f"{name}: {kind} {found[kind][0]} of {found[kind][1]} found, were {before[kind][0]}; "
            f"missed {row['missed'].get(kind)}; {row['reasons'][:3]}"
        )


def test_at_least_forty() -> None:
    assert len(set(QUICK)) >= 40
    assert set(_golden()) == set(QUICK)


def test_why_something_is_not_built_is_said() -> None:
    with pytest.raises(zoo.Unbuildable, match="joins two models"):
        zoo.build("encoder-decoder")
    with pytest.raises(zoo.Unbuildable, match="no configuration of this name"):
        zoo.build("no_such_architecture")


def test_the_same_model_each_time() -> None:
    (one, _, first), (two, _, second) = zoo.build("llama"), zoo.build("llama")
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.training
    assert not one.config.use_cache
    assert all(p.dtype == torch.float32 for p in one.parameters())


def test_other_shapes() -> None:
    model, _, _ = zoo.build("t5")
    _, kwargs = zoo.vary(model, 3, 7)
    assert {name: tuple(value.shape) for name, value in kwargs.items()} == {
        "input_ids": (3, 7),
        "decoder_input_ids": (3, 4),
    }


class _Mixed(torch.nn.Module):
    """By hand: what the truth has to say of it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(12, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.router = torch.nn.Linear(8, 3)
        self.experts = torch.nn.ParameterDict({"up": torch.nn.Parameter(torch.randn(3, 5, 8))})
        self.norm = torch.nn.LayerNorm(8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.norm(self.table(ids))
        scores = (self.q(x) @ self.k(x).transpose(-1, -2)) * 0.3
        x = self.o(scores.softmax(-1) @ self.v(x))
        weight, chosen = self.router(x).softmax(-1).topk(1)
        gathered = self.experts["up"][chosen[..., 0]]
        return (gathered @ x.unsqueeze(-1)).squeeze(-1) * weight


def test_truth_of_a_model_written_by_hand() -> None:
    truth, _ = observe(_Mixed().eval(), (torch.randint(0, 12, (2, 4)),), {})
    assert set(truth.matrices) == {"q.weight", "k.weight", "v.weight", "o.weight", "router.weight", "experts.up"}
    assert truth.parameters == 4 * 64 + 24 + 3 * 5 * 8
    assert dict(truth.attention) == {"": 1}  # the router's softmax is none
    assert {path: r.experts for path, r in truth.routed.items()} == {"experts": 3}
    assert truth.norms == {"norm": "LayerNorm"}


class _Folded(torch.nn.Module):
    """A bias by places and a table, both functions of what the model holds: no product and no norm of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.places: torch.Tensor
        self.register_buffer("places", torch.randn(4, 2))
        self.bias, self.out = torch.nn.Linear(2, 8), torch.nn.Linear(8, 8)
        self.table, self.norm = torch.nn.Parameter(torch.randn(4, 8)), torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(x + self.bias(self.places) + self.norm(self.table))


def test_what_is_made_of_weights_alone_is_no_part_of_the_truth() -> None:
    truth, _ = observe(_Folded().eval(), (torch.randn(3, 4, 8),), {})
    assert set(truth.matrices) == {"out.weight"}
    assert not truth.norms


def test_stages_keep_their_number_and_narrow() -> None:
    model, _, kwargs = zoo.build("swin")
    config: Any = model.config
    assert len(config.depths) == 4
    assert config.embed_dim % config.num_heads[0] == 0
    assert kwargs["pixel_values"].shape[-1] == config.image_size == 64


def test_an_image_takes_the_place_of_its_tokens() -> None:
    model, _, kwargs = zoo.build("got_ocr2")
    config: Any = model.config
    assert (kwargs["input_ids"] == config.image_token_id).sum() == kwargs["input_ids"].numel() - 2 * 10
    assert kwargs["pixel_values"].shape[0] == 2
