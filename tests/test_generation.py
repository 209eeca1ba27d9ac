"""`recast.Generator`: choosing tokens, ends of texts, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recast
from recast.generation import Sampling
from recast.patterns.errors import GenerationError
from tests.lowering.test_onnx_decoder import POSITIONS, TOKENS, exported, ids

pytest.importorskip("onnxruntime")


def test_greedy_takes_the_largest_and_sampling_what_is_likely() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))

    def share(**given: Any) -> np.ndarray[Any, Any]:
        random, sampling = np.random.default_rng(0), Sampling(**given)
        drawn = [int(sampling.choose(logits, random)[0]) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    # Four standard deviations of a share drawn 4000 times are at most 0.032.
    assert share() == pytest.approx([1, 0, 0, 0])
    assert share(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.032)
    assert share(temperature=0.5) == pytest.approx(np.array([25, 9, 2.25, 0.25]) / 36.5, abs=0.032)
    assert share(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.032)
    assert share(temperature=1.0, top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.032)
    assert share(temperature=1.0, top_p=0.2) == pytest.approx([1, 0, 0, 0])


def test_a_seed_gives_the_same_text() -> None:
    generator = recast.Generator(exported("Llama"))
    texts = [generator.generate([ids(5).tolist()], 16, temperature=2.0, seed=seed).ids for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_texts_end_with_their_tokens_each_for_itself() -> None:
    generator = recast.Generator(exported("Llama"))
    prompts = [ids(5).tolist(), ids(11, seed=1).tolist()]
    plain = generator.generate(prompts, 24).ids
    stop = plain[0][6]
    steps: list[list[int | None]] = []
    found = generator.generate(prompts, 24, stop=(stop,), say=steps.append)
    assert found.ids == [row[: row.index(stop)] if stop in row else row for row in plain]
    assert [[token for token in column if token is not None] for column in zip(*steps, strict=True)] == found.ids
    assert generator.generate(prompts[:1], 24, stop=(stop,)).steps == len(found.ids[0])


def test_no_more_is_written_than_there_are_positions() -> None:
    generator = recast.Generator(exported("Llama"))
    assert len(generator.generate([ids(POSITIONS - 3).tolist()], 50).ids[0]) == 4
    assert len(generator.generate([ids(POSITIONS).tolist()], 50).ids[0]) == 1


@pytest.mark.parametrize(
    ("prompts", "given", "told"),
    [
        ([[1] * (POSITIONS + 1)], {}, f"{POSITIONS + 1} tokens, the model has {POSITIONS} positions"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        ([[TOKENS]], {}, f"token {TOKENS}, the model has tokens 0 to {TOKENS - 1}"),
        (["words"], {}, "needs a tokenizer"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
    ],
)
def test_what_does_not_fit_is_refused(prompts: Any, given: Any, told: str) -> None:
    with pytest.raises(GenerationError, match=told):
        recast.Generator(exported("Llama")).generate(prompts, **given)


def test_what_keeps_no_cache_cannot_generate(tmp_path: Path) -> None:
    program = recast.capture(torch.nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    for target, told in (("onnx", "has no key-value cache"), ("eager", "is for target 'eager'")):
        with pytest.raises(GenerationError, match=told):
            recast.Generator(recast.lower(program, target=target))
