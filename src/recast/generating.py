"""`recast generate`: text on standard output as it comes, figures on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recast.generation import Generator
from recast.patterns.errors import GenerationError

__all__ = ["generate_text"]


def generate_text(
    directory: Path,
    prompt: str | None,
    ids: str | None,
    tokenizer: Path | None,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Generate from one prompt and, unless `quiet`, print it on the way; gives ids, text and speed."""
    if (prompt is None) == (ids is None):
        raise GenerationError("generate: give either --prompt 'some words' or --ids 5,17,3")
    given = _ids(ids) if ids is not None else None
    generator = Generator(directory, tokenizer)
    row = generator.tokens(str(prompt)) if given is None else given
    say = None
    if not quiet and prompt is not None:
        _write(prompt)
        say = generator.stream(_write)
    elif not quiet:

        def say(tokens: list[int | None]) -> None:
            _write(f"{tokens[0]} " if tokens[0] is not None else "")

    found = generator.generate([row], max_new_tokens, say=say, **sampling)
    if not quiet:
        _write("\n")
        told = f"{len(row)} tokens read in {found.first_seconds:.2f} s, {len(found.ids[0])} written"
        speed = f", {found.tokens_per_second:.1f} tokens/s" if found.steps else ""
        print(told + speed, file=sys.stderr)
    return {
        "prompt": row,
        "ids": found.ids[0],
        "text": None if prompt is None else generator.text(found.ids[0]),
        "first_seconds": found.first_seconds,
        "tokens_per_second": found.tokens_per_second,
    }


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _ids(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise GenerationError(f"generate: --ids '{text}' are no token ids; 5,17,3 would do")
    return [int(part) for part in parts]
