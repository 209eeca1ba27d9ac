"""A decoder in ONNX Runtime, a step at a time: its cache stays in the runtime's own memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recast.lowering.onnx.cache import past_names, present_names
from recast.lowering.onnx.session import needed
from recast.patterns.errors import TargetError

__all__ = ["Decoding"]

Ids = npt.NDArray[np.int64]


class Decoding:
    """One batch of texts on their way: `start` takes the prompts, `step` a token for each.

    Prompts of different lengths are padded on the left, so that a window reaches as far back as it does in each alone. What
    `present` a step gives is the next one's `past_key_values`, handed over where it lies.

    Parameters
    ----------
    session
        Of a decoder with its cache.
    decoder
        What is known of it (see `recast.Program.decoder`).
    """

    def __init__(self, session: Any, decoder: Mapping[str, Any]) -> None:
        self._session, self._cache = session, decoder["cache"]
        self._runtime = needed("onnxruntime")
        self._past, self._present = past_names(len(self._cache)), present_names(len(self._cache))
        self._positions = "position_ids" in {value.name for value in session.get_inputs()}
        self._types = {value.name: value.type for value in session.get_inputs()}
        self._held: list[Any] = []
        self._mask: Ids = np.zeros((0, 0), np.int64)

    def start(self, prompts: Sequence[Sequence[int]], capacity: int, pad: int = 0) -> npt.NDArray[np.floating[Any]]:
        """Run prompts; give the logits (batch, vocabulary) after the last token of each.

        Parameters
        ----------
        prompts
            Token ids, at least one each.
        capacity
            Most tokens that a text will have.
        pad
            What stands before shorter prompts; it is not looked at.
        """
        lengths = np.array([len(row) for row in prompts])
        ids = np.full((len(prompts), lengths.max()), pad, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[len(row) - len(prompt) :] = prompt
        self._mask = (np.arange(ids.shape[1]) >= lengths.max() - lengths[:, None]).astype(np.int64)
        self._held = [
            self._runtime.OrtValue.ortvalue_from_numpy(np.zeros((len(prompts), heads, 0, size), self._dtype(name)))
            for name, heads, size in zip(
                self._past,
                [h for h, _, _ in self._cache for _ in range(2)],
                [size for _, *sizes in self._cache for size in sizes],
                strict=True,
            )
        ]
        return self._run(ids)[:, -1]

    def step(self, tokens: Ids) -> npt.NDArray[np.floating[Any]]:
        """Append a token (batch,) to each text; give the logits (batch, vocabulary) after it."""
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None])[:, -1]

    def _dtype(self, name: str) -> Any:
        return np.float16 if "float16" in self._types[name] else np.float32

    def _run(self, ids: Ids) -> npt.NDArray[np.floating[Any]]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        if self._positions:
            positions = np.maximum(self._mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, held in zip(self._past, self._held, strict=True):
            binding.bind_ortvalue_input(name, held)
        for name in ("logits", *self._present):
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has a class for every status
            raise TargetError(f"target 'onnx': ONNX Runtime refused a step: {error}") from error
        logits, *self._held = binding.get_outputs()
        found: npt.NDArray[np.floating[Any]] = logits.numpy()
        return found
