"""Writing on from a prompt with a decoder that was exported to ONNX."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recast.lowering.artifact import Artifact, load
from recast.lowering.onnx.decoding import Decoding
from recast.models import require
from recast.patterns.errors import GenerationError

__all__ = ["Generated", "Generator", "Sampling"]

Logits = npt.NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Parameters
    ----------
    temperature
        Logits are divided by it; 0 takes the largest (greedy).
    top_k
        Only so many of the largest are drawn from; 0 for all.
    top_p
        Only the fewest whose probabilities make this share are drawn from.
    seed
        Of the drawing; None for another result in every run.

    Raises
    ------
    GenerationError
        A number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise GenerationError(f"generate: {name} is {getattr(self, name)}; {wanted} would work")

    def choose(self, logits: Logits, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """A token (batch,) for each row of logits (batch, vocabulary).

        Examples
        --------
        >>> rows = np.array([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
        >>> Sampling().choose(rows, np.random.default_rng(0)).tolist()
        [1, 0]
        >>> Sampling(1.0, top_k=1).choose(rows, np.random.default_rng(0)).tolist()
        [1, 0]
        """
        if not self.temperature:
            return np.asarray(logits.argmax(-1), np.int64)
        return np.array([self._draw(row.astype(np.float64), random) for row in logits], np.int64)

    def _draw(self, row: npt.NDArray[np.float64], random: np.random.Generator) -> int:
        order = np.argsort(-row, kind="stable")[: self.top_k or None]
        shares = np.exp((row[order] - row[order[0]]) / self.temperature)
        shares /= shares.sum()
        before = np.cumsum(shares) - shares  # the most likely is always kept
        kept = before < self.top_p
        return int(random.choice(order[kept], p=shares[kept] / shares[kept].sum()))


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was written.

    Parameters
    ----------
    ids
        For each prompt the tokens after it, the one that ended it left out.
    texts
        The same as text, where there is a tokenizer.
    first_seconds
        From the prompt to the first token.
    other_seconds
        For all tokens after it.
    steps
        How many of these there were.
    """

    ids: list[list[int]]
    texts: list[str] | None
    first_seconds: float
    other_seconds: float
    steps: int

    @property
    def tokens_per_second(self) -> float:
        """Of each text, after the first token; 0 if there was none."""
        return self.steps / self.other_seconds if self.other_seconds else 0.0


class Generator:
    """Generates with an artifact of the target ``onnx`` that was captured with its cache.

    Parameters
    ----------
    artifact
        Of ``recast.capture(model, ..., cache=True)``, or the folder it was saved to.
    tokenizer
        Folder with a ``tokenizer.json``; by default the artifact's own.

    Raises
    ------
    GenerationError
        The artifact is no decoder with a cache.
    ArtifactError, TargetError
        It cannot be loaded, or ONNX Runtime is not installed.
    """

    def __init__(
        self, artifact: Artifact | str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
    ) -> None:
        folder = None if isinstance(artifact, Artifact) else Path(artifact)
        self.artifact = artifact if isinstance(artifact, Artifact) else load(artifact)
        lowering: Any = self.artifact.lowering
        if getattr(lowering, "decoder", None) is None:
            target = self.artifact.target
            found = f"is for target '{target}'" if target != "onnx" else "has no key-value cache"
            raise GenerationError(
                f"generate: {'the artifact' if folder is None else repr(str(folder))} {found}; "
                "recast.capture(model, ..., cache=True) lowered to 'onnx', or `recast optimize MODEL --cache -t onnx`, "
                "gives one that generates"
            )
        self.decoder: dict[str, Any] = lowering.decoder
        self._folder = Path(tokenizer) if tokenizer is not None else folder
        self._tokenizer: Any = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        say: Callable[[list[int | None]], None] | None = None,
    ) -> Generated:
        """Write on from prompts.

        Parameters
        ----------
        prompts
            Texts, or rows of token ids; they may differ in length.
        max_new_tokens
            Most tokens to write after each; fewer where the model's positions end.
        temperature, top_k, top_p, seed
            See `Sampling`; greedy by default.
        stop
            Tokens that end a text; the model's own by default, ``()`` for none.
        say
            Called after each step with a token for each prompt, None for those that have ended.

        Raises
        ------
        GenerationError
            A prompt is empty, holds tokens that the model has not, is longer than its positions, or is a text where there is
            no tokenizer.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        if max_new_tokens < 1:
            raise GenerationError(f"generate: max_new_tokens is {max_new_tokens}; 1 or more would work")
        texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        spoken = any(isinstance(text, str) for text in texts)
        rows = [self.tokens(text) if isinstance(text, str) else [int(i) for i in text] for text in texts]
        self._check(rows)
        longest = max(map(len, rows))
        positions = self.decoder["positions"]
        count = max_new_tokens if positions is None else min(max_new_tokens, positions - longest + 1)
        ends = set(self.decoder["eos"] if stop is None else stop)
        random = np.random.default_rng(sampling.seed)
        decoding = Decoding(self.artifact.lowering.session, self.decoder)  # type: ignore[attr-defined]
        written: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        first, steps = 0.0, 0
        begin = time.perf_counter()
        logits = decoding.start(rows, longest + count, pad=self.decoder["pad"] or 0)
        while True:
            chosen = sampling.choose(logits, random)
            first = first or time.perf_counter() - begin
            open_rows -= {row for row in open_rows if int(chosen[row]) in ends}
            for row in open_rows:
                written[row].append(int(chosen[row]))
            if say is not None:
                say([int(token) if row in open_rows else None for row, token in enumerate(chosen)])
            if not open_rows or steps + 1 >= count:
                break
            logits, steps = decoding.step(chosen), steps + 1
        other = time.perf_counter() - begin - first
        return Generated(written, [self.text(row) for row in written] if spoken else None, first, other, steps)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it."""
        found: list[int] = self._reader().encode(text).ids
        return found

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        found: str = self._reader().decode(list(ids))
        return found

    def stream(self, write: Callable[[str], object]) -> Callable[[list[int | None]], None]:
        """What to pass as `say` to have the first prompt's text written as it comes, whole characters at a time."""
        ids: list[int] = []
        shown = ""

        def say(tokens: list[int | None]) -> None:
            nonlocal shown
            if tokens[0] is None:
                return
            ids.append(tokens[0])
            text = self.text(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the token ends within a character
                write(text[len(shown) :])
                shown = text

        return say

    def _reader(self) -> Any:
        if self._tokenizer is None:
            file = None if self._folder is None else self._folder / "tokenizer.json"
            if file is None or not file.is_file():
                raise GenerationError(
                    f"generate: a prompt in words needs a tokenizer, and there is no {file or 'folder with a tokenizer.json'}; give "
                    "token ids (--ids 5,17,3), or the folder of a tokenizer (--tokenizer DIR)"
                )
            tokenizers = require("tokenizers", "a prompt in words")
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(file))
            except Exception as error:  # the package raises plain exceptions
                raise GenerationError(f"generate: '{file}' is no tokenizer: {error}") from error
        return self._tokenizer

    def _check(self, rows: list[list[int]]) -> None:
        positions, vocabulary = self.decoder["positions"], self.decoder["vocabulary"]
        if not rows:
            raise GenerationError("generate: there is no prompt; one text or one row of token ids is needed")
        for number, row in enumerate(rows):
            which = "the prompt" if len(rows) == 1 else f"prompt {number}"
            if not row:
                raise GenerationError(f"generate: {which} is empty; at least one token is needed")
            if positions is not None and len(row) > positions:
                raise GenerationError(
                    f"generate: {which} has {len(row)} tokens, the model has {positions} positions; give a shorter one"
                )
            if vocabulary is not None and not all(0 <= token < vocabulary for token in row):
                wrong = next(token for token in row if not 0 <= token < vocabulary)
                raise GenerationError(
                    f"generate: {which} holds token {wrong}, the model has tokens 0 to {vocabulary - 1}"
                )
