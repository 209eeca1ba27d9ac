"""A causal language model with its key-value cache as plain tensors: one program for the prompt and for every token after it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recast.patterns.errors import CaptureError

__all__ = ["cached_forward", "decoder_facts", "decoder_inputs", "decoder_shapes", "empty_cache", "empty_past"]

Past = Sequence[Sequence[Tensor]]
_EXAMPLE = 3  # cached tokens of the example: any number but 0 and 1, which tracing would fix


@contextlib.contextmanager
def cached_forward(model: nn.Module) -> Iterator[list[str]]:
    """Let a model of transformers take its cache as pairs of tensors, and give it back as such, for the time of tracing.

    ``forward(input_ids, attention_mask, past_key_values, position_ids=None)`` gives ``{"logits": ..., "present": ...}``. Each token's
    position is the number of ones before it in the mask, unless positions are given: padding counts for nothing, on either side.

    Raises
    ------
    CaptureError
        It is no causal language model of transformers.
    """
    inner, own = _checked(model), model.__dict__.get("forward")
    taken = inspect.signature(inner).parameters
    dynamic = importlib.import_module("transformers.cache_utils")

    def forward(
        input_ids: Tensor, attention_mask: Tensor, past_key_values: Past, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        past, length = past_key_values[0][0].shape[-2], input_ids.shape[1]
        torch._check(attention_mask.shape[1] == past + length)  # type: ignore[no-untyped-call]
        for pair in past_key_values:
            for held in pair:
                torch._check(held.shape[0] == input_ids.shape[0])  # type: ignore[no-untyped-call]
                torch._check(held.shape[-2] == past)  # type: ignore[no-untyped-call]
        if position_ids is None:
            # The last ones, not those after the cache: a cache that is written in place is longer than what is in it.
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -length:]
        given = {"position_ids": position_ids} if "position_ids" in taken else {}
        cache = _cache(dynamic, past_key_values)
        result = inner(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        )
        present = tuple((layer.keys, layer.values) for layer in result.past_key_values.layers)
        return {"logits": result.logits, "present": present}

    model.forward = forward
    try:
        yield ["captured with its key-value cache as inputs past_key_values and outputs present"]
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _cache(module: Any, past: Past) -> Any:
    """A growing cache that holds these tensors, without a step that joins them to nothing."""
    cache = module.DynamicCache()
    for key, value in past:
        layer = module.DynamicLayer()
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values, layer.is_initialized = key, value, True
        cache.layers.append(layer)
    return cache


def _checked(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    if config is None or not {"input_ids", "past_key_values", "attention_mask"} <= set(takes):
        raise CaptureError(_refusal(model))
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"capture: cache=True was asked for {type(model).__name__}, an encoder-decoder; only decoders alone are captured with "
            "their cache"
        )
    return model.forward


def _refusal(model: nn.Module) -> str:
    return (
        f"capture: cache=True was asked for {type(model).__name__}, which is no causal language model of transformers with a "
        "key-value cache; capture one (AutoModelForCausalLM), or write a forward that takes the cache's tensors and returns the new "
        "ones"
    )


def empty_past(model: nn.Module, batch: int, length: int = 0) -> tuple[tuple[Tensor, Tensor], ...]:
    """A cache of `length` zero tokens, as the model itself lays one out.

    Returns
    -------
    tuple of (key, value)
        For each layer, each (batch, heads of keys, length, features of a head).
    """
    dynamic = importlib.import_module("transformers.cache_utils")
    cache = dynamic.DynamicCache()
    device = next(model.parameters()).device
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    if not cache.layers or not isinstance(getattr(result, "logits", None), Tensor):
        raise CaptureError(_refusal(model))
    made = []
    for layer in cache.layers:
        if not isinstance(getattr(layer, "keys", None), Tensor) or layer.keys.dim() != 4:
            raise CaptureError(
                f"capture: cache=True was asked for {type(model).__name__}, which keeps something else than keys and values of "
                f"every token ({type(layer).__name__}); capture it without"
            )
        k, v = layer.keys, layer.values
        made.append(
            (k.new_zeros(batch, k.shape[1], length, k.shape[3]), v.new_zeros(batch, v.shape[1], length, v.shape[3]))
        )
    return tuple(made)


def decoder_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs to trace with, from ``input_ids`` (and ``position_ids``): a mask of ones and a cache of a few tokens are added."""
    _checked(model)
    if len(args) > 1 or (args and "input_ids" in kwargs):
        raise CaptureError("capture: with cache=True, input_ids (and position_ids) are given by name")
    ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise CaptureError("capture: with cache=True, input_ids (batch, sequence) are needed, integers")
    if ids.shape[1] < 2:
        ids = ids.expand(-1, 2)
    if ids.shape[0] < 2:
        ids = ids.expand(2, -1)
    batch, length = ids.shape
    made: dict[str, Any] = {"input_ids": ids}
    past = _EXAMPLE
    while past in (batch, length):
        past += 1
    made["attention_mask"] = torch.ones(batch, past + length, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    made["past_key_values"] = tuple(
        tuple(torch.randn(held.shape, generator=generator, dtype=torch.float32).to(held) for held in pair)
        for pair in empty_past(model, batch, past)
    )
    if kwargs.get("position_ids") is not None:
        made["position_ids"] = torch.arange(past, past + length).expand(batch, length)
    return made


def decoder_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """What stays free of them: batch, sequence, and what is in the cache."""
    free = torch.export.Dim.AUTO
    past = tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in inputs["past_key_values"])
    return {name: past if name == "past_key_values" else {0: free, 1: free} for name in inputs}


def decoder_facts(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a generation loop has to know of a captured decoder, as plain values.

    Returns
    -------
    dict
        ``model_type``, ``vocabulary``, ``positions`` (None if any number is taken), ``hidden``, ``heads``, ``eos`` (a list),
        ``bos``, ``pad``, ``takes_positions`` (as an input), and of the cache ``dtype`` and ``cache``:
        for each layer heads of keys, features of a key and of a value.
    """
    config: Any = model.config
    generation = getattr(model, "generation_config", None)

    def known(name: str) -> Any:
        found = getattr(config, name, None)
        return getattr(generation, name, None) if found is None else found

    ends = getattr(generation, "eos_token_id", None)
    ends = known("eos_token_id") if ends is None else ends
    return {
        "model_type": str(getattr(config, "model_type", "")),
        "vocabulary": known("vocab_size"),
        "positions": known("max_position_embeddings"),
        "hidden": known("hidden_size"),
        "heads": known("num_attention_heads"),
        "eos": [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends],
        "bos": known("bos_token_id"),
        "pad": known("pad_token_id"),
        "takes_positions": "position_ids" in inputs,
        "dtype": str(inputs["past_key_values"][0][0].dtype).removeprefix("torch."),
        "cache": [[k.shape[1], k.shape[3], v.shape[3]] for k, v in inputs["past_key_values"]],
    }


def empty_cache(decoder: Mapping[str, Any], batch: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """A cache without a token, for a captured decoder.

    Parameters
    ----------
    decoder
        Of `decoder_facts`.
    batch
        Number of texts.

    Returns
    -------
    tuple of (key, value)
        For each layer, (batch, heads, 0, features).

    Examples
    --------
    >>> [(key, value)] = empty_cache({"dtype": "float32", "cache": [[2, 16, 16]]}, batch=3)
    >>> key.shape
    torch.Size([3, 2, 0, 16])
    """
    dtype = getattr(torch, decoder["dtype"])
    return tuple(
        (torch.zeros(batch, heads, 0, key, dtype=dtype), torch.zeros(batch, heads, 0, value, dtype=dtype))
        for heads, key, value in decoder["cache"]
    )
