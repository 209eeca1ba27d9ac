"""Text that every Python brings: its library's sources and the pages of its documentation that `help()` shows.

A file belongs to the held-out part by a digest of its name, so that another version of Python divides the files alike and
nothing that a model was trained on moves over to what it is judged on.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

END = "<|end|>"
VOCABULARY = 4096
# Not text somebody wrote to be read (tables, what `configure` found), not part of every installation (tests), or here twice.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__", "__pycache__"}
HELD_OUT = 16  # one file of so many


@dataclass(frozen=True)
class Tokens:
    """The two parts of the corpus, each one row of tokens: files one after the other, `END` behind each."""

    training: Tensor
    held_out: Tensor


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of every page and every source file, in the order of their names."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        within = path.relative_to(library)
        if any(part in LEFT_OUT or part.startswith("config-") for part in within.parts[:-1]):
            continue
        if path.name.startswith("_sysconfigdata") or path.stat().st_size < 256:
            continue
        try:
            yield within.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the few that declare another encoding
            continue


def is_held_out(name: str) -> bool:
    """Whether a document is for judging and not for training or calibration."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def train_tokenizer() -> Any:
    """Byte-level BPE of `VOCABULARY` tokens, learned from the training part."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name, text in documents() if not is_held_out(name)), trainer)
    return tokenizer


def encode(tokenizer: Any) -> Tokens:
    """Encode the whole corpus."""
    end = tokenizer.token_to_id(END)
    parts: dict[bool, list[np.ndarray[Any, Any]]] = {False: [], True: []}
    for name, text in documents():
        parts[is_held_out(name)].append(np.array([*tokenizer.encode(text).ids, end], dtype=np.int64))
    return Tokens(torch.from_numpy(np.concatenate(parts[False])), torch.from_numpy(np.concatenate(parts[True])))


def windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """Spread windows evenly over a row of tokens: [count, length]."""
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def perplexity(run: Callable[[Tensor], Tensor], judged: Tensor, batch: int = 8) -> float:
    """Perplexity of the tokens of some windows, all but the first of each.

    Parameters
    ----------
    run
        Ids [batch, length] to logits [batch, length, vocabulary].
    judged
        [windows, length + 1].
    batch
        Windows at a time.
    """
    total = 0.0
    with torch.no_grad():
        for rows in torch.split(judged, batch):
            logits = run(rows[:, :-1]).double().flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
    mean = total / judged[:, 1:].numel()
    return math.exp(mean) if mean < 700 else math.inf


def baselines(tokens: Tokens, judged: Tensor, vocabulary: int, weight: float = 64.0) -> dict[str, float]:
    """Perplexity of guessing by how often a token is, and by how often it follows the one before.

    Parameters
    ----------
    tokens
        The training part is counted.
    judged
        [windows, length]; every token but the first of a window is guessed.
    vocabulary
        How many tokens there are.
    weight
        How many observations the unigram counts for in the bigram.
    """
    seen = tokens.training.numpy()
    single = np.bincount(seen, minlength=vocabulary) + 1.0
    chance = single / single.sum()
    pairs, counts = np.unique(seen[:-1] * vocabulary + seen[1:], return_counts=True)
    before, after = judged[:, :-1].numpy().ravel(), judged[:, 1:].numpy().ravel()
    wanted = before * vocabulary + after
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    found = np.where(pairs[place] == wanted, counts[place], 0)
    bigram = (found + weight * chance[after]) / (np.bincount(seen[:-1], minlength=vocabulary)[before] + weight)
    return {
        "unigram": float(np.exp(-np.log(chance[after]).mean())),
        "bigram": float(np.exp(-np.log(bigram).mean())),
    }
