"""Names of a decoder's key-value cache in an ONNX graph: those that generation loops look for."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["cache_inputs", "past_names", "present_names"]

_ROLES = ("key", "value")


def cache_inputs(names: Sequence[str | None]) -> list[str | None]:
    """``past_key_values_3_0`` becomes ``past_key_values.3.key``; other names stay.

    Examples
    --------
    >>> cache_inputs(["input_ids", "past_key_values_0_1"])
    ['input_ids', 'past_key_values.0.value']
    """
    found: list[str | None] = []
    for name in names:
        part = re.fullmatch(r"past_key_values_(\d+)_([01])", name or "")
        found.append(f"past_key_values.{part[1]}.{_ROLES[int(part[2])]}" if part else name)
    return found


def past_names(layers: int) -> list[str]:
    """``past_key_values.0.key``, ``past_key_values.0.value``, ``past_key_values.1.key`` ..."""
    return [f"past_key_values.{layer}.{role}" for layer in range(layers) for role in _ROLES]


def present_names(layers: int) -> list[str]:
    """``present.0.key``, ``present.0.value``, ``present.1.key`` ..."""
    return [f"present.{layer}.{role}" for layer in range(layers) for role in _ROLES]
