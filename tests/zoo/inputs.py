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
    if isinstance(main, list):  # several; the first is what the model looks at
        main = main[0]
    if "input_ids" not in parameters and ("grid_thw" in parameters or "spatial_shapes" in parameters):
        kwargs = _patches(draw, config, batch, parameters)
    elif (
        main == "input_ids"
        or (main not in parameters and "input_ids" in parameters)
        or ("input_ids" in parameters and main == "pixel_values")
    ):
        kwargs = {"input_ids": _ids(draw, batch, length, model)}
        if "pixel_values" in parameters:
            kwargs |= _with_image(draw, batch, kwargs["input_ids"], model)
    elif main in _MAKERS:
        kwargs = {main: _MAKERS[main](draw, config, batch, length, model)}
    else:
        raise NoInputs(f"main input '{main}' is not one of {sorted(_MAKERS)}")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = _ids(draw, batch, max(1, length - 3), model)
    return (), kwargs


def _with_image(draw: torch.Generator, batch: int, ids: Tensor, model: Any) -> dict[str, Tensor]:
    """An image beside the text: as another input of a model of both, or in place of tokens, as many as its features are."""
    config = model.config
    pixels = _pixels(draw, config, batch, 0, model)
    token = next(
        (t for n in ("image_token_id", "image_token_index") if (t := getattr(config, n, None)) is not None), None
    )
    needed = inspect.signature(model.forward).parameters["pixel_values"].default is inspect.Parameter.empty
    if token is None:
        joint = all(hasattr(config, part) for part in ("text_config", "vision_config"))
        return {"pixel_values": pixels} if joint or needed or hasattr(config, "image_size") else {}
    try:
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", None) if hasattr(features, "keys") else features
            held = torch.cat([*features]) if isinstance(features, list | tuple) else features
            count = held.numel() // held.shape[-1]
            places = torch.full((batch, count // batch), token)
            together = torch.cat([ids[:, :1], places, ids[:, 1:]], 1)
            model(input_ids=together, pixel_values=pixels)
    except Exception:  # noqa: BLE001  # it wants more than pixels: the text alone is given
        return {"pixel_values": pixels} if needed else {}
    return {"input_ids": together, "pixel_values": pixels}


def _patches(draw: torch.Generator, config: Any, batch: int, parameters: Any) -> dict[str, Tensor]:
    """Images as rows of patches, with their heights and widths in patches."""
    size = _find(config, "patch_size", default=8)
    features = _find(config, "in_channels", "num_channels", "in_chans", default=3) * size * size
    if "spatial_shapes" in parameters:
        return {
            "pixel_values": torch.randn(batch, 16, features, generator=draw),
            "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[4, 4]] * batch),
        }
    main = "hidden_states" if "hidden_states" in parameters else "pixel_values"
    features *= _find(config, "temporal_patch_size", default=1)
    return {
        main: torch.randn(16 * batch, features, generator=draw),
        "grid_thw": torch.tensor([[1, 4, 4]] * batch),
    }


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
    "inputs": lambda draw, config, batch, length, model: _ids(draw, batch, length, model),
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "input_values": _samples,
    "input_features": _features,
    "past_values": _past,
}
