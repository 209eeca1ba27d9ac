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
Logits = npt.NDArray[np.floating[Any]]


class Decoding:
    """One batch of texts on their way: `start` takes the prompts, `step` a token for each.

    With GroupQueryAttention prompts of different lengths are padded on the right, and each text's own tokens follow each other in
    the cache; with standard operators on the left, so that a window reaches as far back as it does in each text alone. Where
    nothing else looks at the cache it is made once, as long as it will be, and written in place; else what `present` a step gives
    is the next one's `past_key_values`, handed over where it lies.

    Parameters
    ----------
    session
        Of a decoder with its cache.
    decoder
        What is known of it (see `recast.Program`), whether its attention is ``grouped``, its cache written ``in_place``, and what
        it is ``held`` in.
    """

    def __init__(self, session: Any, decoder: Mapping[str, Any]) -> None:
        self._session, self._cache = session, decoder["cache"]
        self._grouped, self._in_place = bool(decoder.get("grouped")), bool(decoder.get("in_place"))
        self._beside = int(decoder.get("held") == "int8")  # a vector's codes have their scale beside them
        self._runtime = needed("onnxruntime")
        self._past, self._present = past_names(len(self._cache)), present_names(len(self._cache))
        self._types = {value.name: value.type for value in session.get_inputs()}
        self._held: list[Any] = []
        self._mask: Ids = np.zeros((0, 0), np.int64)

    def start(self, prompts: Sequence[Sequence[int]], capacity: int, pad: int = 0) -> Logits:
        """Run prompts; give the logits (batch, vocabulary) after the last token of each.

        Parameters
        ----------
        prompts
            Token ids, at least one each.
        capacity
            Most tokens that a text will have.
        pad
            What stands beside shorter prompts; it is not looked at.
        """
        batch, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
        ids = np.full((batch, lengths.max()), pad, np.int64)
        self._mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            own = slice(len(prompt)) if self._grouped else slice(ids.shape[1] - len(prompt), None)
            ids[row, own], self._mask[row, own] = prompt, 1
        self._held = [
            self._runtime.OrtValue.ortvalue_from_numpy(
                np.zeros(
                    (batch, heads, capacity if self._in_place else 0, size + self._beside),
                    self._dtype(f"past_key_values.{i}.{role}"),
                )
            )
            for i, (heads, *sizes) in enumerate(self._cache)
            for role, size in zip(("key", "value"), sizes, strict=True)
        ]
        logits = self._run(ids)
        if logits.shape[1] == 1:  # of the last tokens alone
            return logits[:, 0]
        last = lengths - 1 if self._grouped else np.full(batch, ids.shape[1] - 1)
        found: Logits = logits[np.arange(batch), last]
        return found

    def step(self, tokens: Ids) -> Logits:
        """Append a token (batch,) to each text; give the logits (batch, vocabulary) after it."""
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(tokens[:, None])[:, -1]

    def _dtype(self, name: str) -> Any:
        known = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}
        return known.get(self._types[name], np.float32)

    def _run(self, ids: Ids) -> Logits:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", self._mask)
        if "position_ids" in self._types:
            positions = np.maximum(self._mask.cumsum(-1) - 1, 0)
            own = positions[:, -ids.shape[1] :]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(own))
        binding.bind_output("logits", "cpu")
        for past, present, held in zip(self._past, self._present, self._held, strict=True):
            binding.bind_ortvalue_input(past, held)
            if self._in_place:
                binding.bind_ortvalue_output(present, held)
            else:
                binding.bind_output(present, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime has a class for every status
            raise TargetError(f"target 'onnx': ONNX Runtime refused a step: {error}") from error
        logits, *present = binding.get_outputs()
        self._held = self._held if self._in_place else present
        found: Logits = logits.numpy()
        return found
