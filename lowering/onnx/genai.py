"""`genai_config.json`: what onnxruntime-genai reads beside a decoder's ``model.onnx``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recast.patterns.errors import TargetError

__all__ = ["genai_config"]

_CONTEXT = 4096  # where a model takes any number of positions


def genai_config(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a decoder to onnxruntime-genai.

    Parameters
    ----------
    decoder
        See `recast.Program`; ``in_place`` tells whether its cache can be written where it is.

    Raises
    ------
    TargetError
        Its layers differ in their cache, which the format has no words for.
    """
    layers = [tuple(layer) for layer in decoder["cache"]]
    heads, size, *_ = layers[0]
    if set(layers) != {(heads, size, size)}:
        raise TargetError(
            "target 'onnx': genai_config.json has one number of heads and features for all layers, keys and values; this decoder "
            f"has {sorted(set(layers))} (heads, features of a key, of a value); leave genai=True out"
        )
    length = decoder["positions"] or _CONTEXT
    ends = list(decoder["eos"])
    pad = decoder["pad"] if decoder["pad"] is not None else (ends or [0])[0]
    return {
        "model": {
            "type": decoder["model_type"],
            "context_length": length,
            "vocab_size": decoder["vocabulary"],
            "bos_token_id": decoder["bos"] if decoder["bos"] is not None else pad,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or [pad],
            "pad_token_id": pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": decoder["hidden"],
                "head_size": size,
                "num_attention_heads": decoder["heads"],
                "num_key_value_heads": heads,
                "num_hidden_layers": len(layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    **({"position_ids": "position_ids"} if decoder.get("takes_positions") else {}),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": bool(decoder.get("in_place")),
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
