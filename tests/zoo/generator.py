"""Build a tiny model of any architecture that transformers names."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.zoo.exceptions import EXCEPTIONS
from tests.zoo.inputs import NoInputs, example
from tests.zoo.shrink import shrink

BATCH, LENGTH = 2, 10
LARGEST = 20_000_000  # parameters; more means that a size was not made small

# Which class is built, the first that an architecture has: tables of `transformers.models.auto.modeling_auto`.
_ENCODER_DECODER = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")
_ORDER = {
    "text": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "multimodal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "audio": ("MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    "other": ("MODEL_MAPPING_NAMES",),
}


class Unbuildable(Exception):
    """An architecture of which no small instance can be built, and why."""


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    with _quiet():
        from transformers.models.auto import modeling_auto

    names = [*_ENCODER_DECODER, *[table for tables in _ORDER.values() for table in tables]]
    return {name: dict(getattr(modeling_auto, name)) for name in names}


@functools.cache
def families() -> dict[str, tuple[str, ...]]:
    """Architectures by family: ``encoder-decoder``, ``text``, ``multimodal``, ``audio``, ``vision`` and ``other``."""
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for family, tables in [("encoder-decoder", _ENCODER_DECODER), *_ORDER.items()]:
        members = {name for table in tables for name in _tables()[table]} - taken
        taken |= members
        found[family] = tuple(sorted(members))
    return found


def names(*family: str) -> list[str]:
    """Architectures, all or those of some families, whether they can be built or not."""
    return sorted(name for f, members in families().items() if not family or f in family for name in members)


def build(name: str, batch: int = BATCH, length: int = LENGTH) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A tiny model of an architecture with random weights, float32, eval mode, without cache, and inputs for it.

    Parameters
    ----------
    name
        As transformers calls it (``model_type``).
    batch, length
        Of the inputs.

    Raises
    ------
    Unbuildable
        No small instance can be built; the message says why.
    """
    exception = EXCEPTIONS.get(name, {})
    if "refused" in exception:
        raise Unbuildable(f"{name}: {exception['refused']}")
    with _quiet():
        try:
            model = _model(name, exception, fill=False)
        except Exception as error:  # noqa: BLE001  # whatever goes wrong on the way is the reason
            try:
                model = _model(name, exception, fill=True)
            except Exception as second:  # noqa: BLE001
                again = "" if _reason(second) == _reason(error) else f"; with open attributes filled: {_reason(second)}"
                raise Unbuildable(f"{name}: {_reason(error)}{again}") from error
        args, kwargs = vary(model, batch, length)
    return model, args, kwargs


def vary(model: nn.Module, batch: int, length: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Other inputs for a model of the zoo."""
    name = model.zoo_name
    try:
        args, kwargs = example(model, batch, length, seed)
    except NoInputs as error:
        raise Unbuildable(f"{name}: {error}") from error
    make = EXCEPTIONS.get(str(name), {}).get("inputs")
    return (args, make(model, batch, length, kwargs)) if make is not None else (args, kwargs)


def _reason(error: BaseException) -> str:
    if isinstance(error, Unbuildable):
        return str(error)
    inner = error.__cause__ or error
    first = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return f"{type(inner).__name__}: {first[:300]}"


def _model(name: str, exception: dict[str, Any], fill: bool) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        raise Unbuildable("transformers has no configuration of this name")
    config = shrink(CONFIG_MAPPING[name](), exception.get("config"), fill=fill)
    for part in _parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        if not hasattr(part, "pad_token_id"):  # transformers 5.0 reads it of configurations that lack it
            part.pad_token_id = None
    cls = getattr(transformers, _class_name(name, config, exception))
    config = _fitting(config, cls)
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in cls(config).named_parameters()}
    if sum(sizes.values()) > LARGEST:
        worst = max(sizes, key=sizes.__getitem__)
        raise Unbuildable(
            f"{sum(sizes.values()):,} parameters, the largest '{worst}' with {sizes[worst]:,}: not made small"
        )
    torch.manual_seed(0)
    model: nn.Module = cls(config).float().eval()
    _randomise(model)
    model.zoo_name = name  # type: ignore[assignment]
    return model


def _class_name(name: str, config: Any, exception: dict[str, Any]) -> str:
    if "head" in exception:
        return str(exception["head"])
    tables = [table for tables in _ORDER.values() for table in tables]
    if getattr(config, "is_encoder_decoder", False) or not any(name in _tables()[t] for t in tables[:-1]):
        tables = [*_ENCODER_DECODER, *tables]
    for table in tables:
        if found := _tables()[table].get(name):
            return str(found if isinstance(found, str) else found[0])
    raise Unbuildable("no class in any table of transformers' auto classes")


def _fitting(config: Any, cls: Any) -> Any:
    """The part of a configuration that a class is made from: some heads take the text's alone."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in _parts(config) if isinstance(part, wanted)), config)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for key in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, key, None)
        if part is not None:
            yield from _parts(part)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Values of the size of trained ones everywhere: transformers' own zeros and ones would hide mistakes."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim >= 2 and parameter.numel():
            parameter.copy_(
                noise / math.sqrt(max(1, parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]))
            )
        else:
            parameter.add_(0.1 * noise)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.add_(0.1 * torch.randn(module.running_mean.shape, generator=draw))
            module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=draw))  # type: ignore[union-attr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers has to say about odd configurations."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
