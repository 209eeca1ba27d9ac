"""Example inputs of a model, by what its main input is called."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tests.zoo.shrink import IMAGE, VOCABULARY

TOP = VOCABULARY - 40  # the ids above are special ones


class NoInputs(Exception):
    """No way is known to make inputs for a model."""


def example(model: Any, batch: int, length: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments; `length` counts tokens, frames, or nothing where the model has one size only."""
    draw = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    config, main = model.config, model.main_input_name
    if (
        main == "input_ids"
        or (main not in parameters and "input_ids" in parameters)
        or ("input_ids" in parameters and main == "pixel_values")
    ):
        kwargs = {"input_ids": _ids(draw, batch, length, model)}
    elif main in _MAKERS:
        kwargs = {main: _MAKERS[main](draw, config, batch, length, model)}
    else:
        raise NoInputs(f"main input '{main}' is not one of {sorted(_MAKERS)}")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = _ids(draw, batch, max(1, length - 3), model)
    return (), kwargs


def _ids(draw: torch.Generator, batch: int, length: int, model: Any) -> Tensor:
    top = TOP
    for table in (getattr(model, "get_input_embeddings", None),):
        try:
            rows = table().weight.shape[0] if table is not None else top
        except (NotImplementedError, AttributeError):
            rows = top
        top = min(top, rows)
    return torch.randint(3, top, (batch, length), generator=draw)


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of some attributes, of the configuration or of the part about the input."""
    parts = [
        config,
        *[
            getattr(config, part, None)
            for part in ("vision_config", "audio_config", "encoder_config", "backbone_config", "encoder")
        ],
    ]
    for part in parts:
        for name in names:
            if part is not None and (value := getattr(part, name, None)) is not None:
                return value
    return default


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[-1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _pixels(draw: torch.Generator, config: Any, batch: int, length: int, model: Any) -> Tensor:
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    height, width = _pair(_find(config, "image_size", "img_size", "input_size", default=2 * IMAGE))
    frames = getattr(config, "num_frames", None)
    shape = (batch, frames, channels, height, width) if frames else (batch, channels, height, width)
    return torch.randn(shape, generator=draw)


def _videos(draw: torch.Generator, config: Any, batch: int, length: int, model: Any) -> Tensor:
    height, width = _pair(_find(config, "image_size", "crop_size", default=IMAGE))
    frames = _find(config, "num_frames", "frames_per_clip", default=4)
    return torch.randn(
        batch, frames, _find(config, "num_channels", "in_chans", default=3), height, width, generator=draw
    )


def _samples(draw: torch.Generator, config: Any, batch: int, length: int, model: Any) -> Tensor:
    """Sound as samples, or as the spectrogram that some models call by the same name."""
    bins = getattr(config, "num_mel_bins", None)
    if (frames := getattr(config, "max_length", None)) and bins and not hasattr(config, "conv_stride"):
        return torch.randn(batch, frames, bins, generator=draw)
    hop = 1
    for stride in _find(config, "conv_stride", "upsampling_ratios", "downsampling_ratios", default=[320]):
        hop *= stride
    channels = getattr(config, "audio_channels", None)
    samples = hop * length + hop // 2
    return torch.randn((batch, channels, samples) if channels else (batch, samples), generator=draw)


def _features(draw: torch.Generator, config: Any, batch: int, length: int, model: Any) -> Tensor:
    """Sound as frames of features; Whisper's kin take features first and one number of frames."""
    if frames := _find(config, "max_source_positions") if _find(config, "num_mel_bins") else None:
        return torch.randn(batch, _find(config, "num_mel_bins"), 2 * frames, generator=draw)
    width = _find(
        config,
        "feature_projection_input_dim",
        "input_feat_per_channel",
        "num_mel_bins",
        "input_dim",
        "input_feat_size",
        default=80,
    )
    return torch.randn(batch, 8 * length, width, generator=draw)


def _past(draw: torch.Generator, config: Any, batch: int, length: int, model: Any) -> Tensor:
    channels = getattr(config, "num_input_channels", None)
    window = getattr(config, "context_length", None) or 32
    return torch.randn((batch, window, channels) if channels else (batch, window), generator=draw)


_MAKERS = {
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "input_values": _samples,
    "input_features": _features,
    "past_values": _past,
}
